"""The interface that existing trainers and scripts import, thin over `AdapterSet`."""
