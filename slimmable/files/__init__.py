"""Files: models as safetensors, plans as JSON, recipes of timm models, SlimCLR's checkpoints."""
