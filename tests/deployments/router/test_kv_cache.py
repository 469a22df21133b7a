"""The pool of keys and values. About 0.1 s."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cluster.errors import ConfigError, UnsupportedModelError
from deployments.router.kv_cache import PagedKVCache, RowShape

CPU = torch.device("cpu")
NONE = torch.zeros(0, dtype=torch.long)


def make_cache(pages: int = 3, page_tokens: int = 2, latent: tuple[int, ...] = ()) -> PagedKVCache:
    return PagedKVCache(pages, page_tokens, dtype=torch.float32, device=CPU, latent_layers=latent)


def write(cache: PagedKVCache, slots: list[int], key: Tensor, value: Tensor, fresh: list[int] | None = None) -> None:
    cache.begin_step(torch.tensor(slots), torch.tensor(fresh or [], dtype=torch.long))
    cache.update(key, value, 0)


def test_rows_are_found_under_their_pages_in_order() -> None:
    cache = make_cache()
    key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5)
    write(cache, [4, 5, 0], key, value)
    keys, values = cache.gather(0, torch.tensor([[2, 0]]))
    assert torch.equal(keys[0, :3], key[0].transpose(0, 1))
    assert torch.equal(values[0, :3], value[0].transpose(0, 1))


def test_update_returns_the_new_rows_only() -> None:
    cache = make_cache()
    write(cache, [0, 1], torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4))
    key, value = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    cache.begin_step(torch.tensor([2]), NONE)
    assert cache.update(key, value, 0) == (key, value)


def test_a_latent_layer_keeps_the_compressed_row_once_and_gives_it_as_key_and_value() -> None:
    cache = make_cache(latent=(0,))
    latent, rotary = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 2)
    write(cache, [3], latent, rotary)
    assert cache.shapes[0] == RowShape(heads=1, key=10, value=0, latent=True)
    keys, values = cache.gather(0, torch.tensor([[1]]))
    assert keys is values
    assert torch.equal(keys[0, 1, 0], torch.cat((latent, rotary), -1).flatten())


def test_the_pool_is_as_large_as_promised_and_never_grows() -> None:
    cache = make_cache(pages=10, page_tokens=4)
    cache.reserve({0: RowShape(2, 8, 8, latent=False), 1: RowShape(1, 10, 0, latent=True)})
    expected = (10 + 2) * 4 * (2 * 16 + 10) * 4
    assert cache.pool_bytes == expected
    write(cache, [0], torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    assert cache.pool_bytes == expected


def test_a_page_with_an_overflow_in_it_is_clean_for_its_next_owner() -> None:
    cache = make_cache()
    write(cache, [2, 3], torch.full((1, 1, 2, 4), torch.inf), torch.full((1, 1, 2, 4), torch.nan))
    write(cache, [2], torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), fresh=[1])
    keys, values = cache.gather(0, torch.tensor([[1]]))
    assert keys[0, :, 0, 0].tolist() == values[0, :, 0, 0].tolist() == [1.0, 0.0]


def test_the_null_page_is_zero_and_apart_from_the_spill_page() -> None:
    cache = make_cache()
    write(cache, [cache.spill_page * 2], torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    keys, _ = cache.gather(0, torch.tensor([[cache.null_page]]))
    assert not keys.any()


def test_state_besides_keys_and_values_is_refused_by_its_name() -> None:
    cache = make_cache()
    with pytest.raises(UnsupportedModelError, match="recurrent state"):
        cache.update_recurrent_state(torch.zeros(1), 0)
    with pytest.raises(UnsupportedModelError, match="indexer"):
        cache.update_indexer(torch.zeros(1), 0)
    assert not hasattr(cache, "is_sliding")


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_tokens"):
        make_cache(pages=0)
