"""Tools on adapter files, without loading a model: inspect, resize, combine."""

from lycoris.tools.combining import Combination, combine
from lycoris.tools.inspecting import Inspection, inspect
from lycoris.tools.limits import Limit
from lycoris.tools.resizing import Resizing, resize

__all__ = ["Combination", "Inspection", "Limit", "Resizing", "combine", "inspect", "resize"]
