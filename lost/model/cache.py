"""A KV cache that a token is written into, where transformers' own copies all it holds for every token."""

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lost.model.other_families import OTHER_FAMILIES, PREFIX

# Tokens that the memory of a layer is longer by, each time that it is full.
ROOM = 256


class RoomyLayer(DynamicLayer):
    """`DynamicLayer` whose keys and values are views of longer memory. Same values, whatever is done to it.

    What replaces keys or values by others (beams that are chosen, a batch that is repeated) leaves that memory; the
    next token takes new one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[Tensor | None] = [None, None]

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: object,  # noqa: ARG002
        **kwargs: object,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """The keys and the values of all tokens, [batch, heads, tokens, head_dim] each, these ones last."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.rooms[0], self.keys = extended(self.rooms[0], self.keys, key_states)
        self.rooms[1], self.values = extended(self.rooms[1], self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forgets all tokens."""
        self.rooms = [None, None]
        super().reset()


def extended(room: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The memory, [batch, heads, more tokens, head_dim], and held and new in it, one after the other.

    Args:
        room: memory of the last call.
        held: what it returned then, maybe cropped at its end, or any other tensor; empty at the start.
        new: [batch, heads, tokens, head_dim].
    """
    length = held.shape[-2] if held.numel() else 0
    total = length + new.shape[-2]
    if room is None or total > room.shape[-2] or not begins(held, room):
        room = new.new_empty(*new.shape[:-2], total + ROOM, new.shape[-1])
        if length:
            room[..., :length, :] = held
    room[..., length:total, :] = new
    return room, room[..., :total, :]


def begins(held: Tensor, room: Tensor) -> bool:
    """Whether held is the beginning of room, not a copy of it or of a part of its batch."""
    return (held.data_ptr(), held.stride(), held.shape[:2]) == (room.data_ptr(), room.stride(), room.shape[:2])


def roomy_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache with room where a layer keeps all tokens (a sliding window has its own); None: transformers' own
    choice, for families that LOST has no form of and where the model's generation config names a kind of cache.
    """
    family = model.config.model_type.removeprefix(PREFIX)
    if family not in ("llama", *OTHER_FAMILIES) or getattr(model.generation_config, "cache_implementation", None):
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
