"""The interface that existing trainers and scripts import, a thin layer over `AdapterSet`."""
