"""Configs: OmegaConf resolvers such as `content_hash`, and checks of types and secrets."""
