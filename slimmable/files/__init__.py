"""Files: models as safetensors, plans as JSON, how timm made a network, checkpoints of SlimCLR."""
