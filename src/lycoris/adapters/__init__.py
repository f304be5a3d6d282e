"""How do adapters get onto a model, act there, and come off?"""
