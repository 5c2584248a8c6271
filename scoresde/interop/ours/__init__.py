"""Models of this package on the Hugging Face hub; their files are `scoresde.store`'s."""

from scoresde.interop.ours.hub import download, from_pretrained, is_hub_id, push_to_hub, save_pretrained

__all__ = ["download", "from_pretrained", "is_hub_id", "push_to_hub", "save_pretrained"]
