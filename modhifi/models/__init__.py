"""Every way to get a model: timm, transformers, the hub, a module of your own, an artefact of ours."""
