"""The prefix MLP: all prefixes at once, step by step, and the naive network on masked one-hot prefixes."""

import numpy as np
import pytest
import torch

from actors.environments.noise import UniformSubstitution
from learner.networks import MLPConfig, build_network
from learner.networks.mlp import PrefixMLP
from learner.networks.prefixes import index_prefixes
from learner.space import SequenceSpace
from tests.reference import draw_paths, fixed_space, mlp_outputs, randomise, variable_space

CASES = [
    (fixed_space(4, 5), ()),
    (fixed_space(4, 5), "auto"),
    (fixed_space(2, 6), (2, 4)),
    (variable_space(3, 5, 0), "auto"),
    (variable_space(4, 4, 2), (3,)),
]


def network_of(space: SequenceSpace, kmer_sizes: tuple[int, ...] | str, **settings: int | None) -> PrefixMLP:
    settings = {"num_layers": 3, "embedding_size": 3} | settings
    network = build_network(space, 5, MLPConfig(hidden_size=7, kmer_sizes=kmer_sizes, **settings))
    randomise(network, seed=1)
    return network


def stepped(network: PrefixMLP, prefix: np.ndarray) -> torch.Tensor:
    state = network.start()
    for token in prefix:
        state = network.extend(state, torch.zeros(1, dtype=torch.int64), torch.tensor([int(token)]))
    return network.outputs(state)[0]


@pytest.mark.parametrize("embedding_size", [None, 3])
@pytest.mark.parametrize(("space", "kmer_sizes"), CASES, ids=str)
@torch.no_grad()
def test_all_prefixes_equal_steps_and_the_naive_network(
    space: SequenceSpace, kmer_sizes: tuple[int, ...] | str, embedding_size: int | None
):
    network = network_of(space, kmer_sizes, embedding_size=embedding_size)
    batch = draw_paths(space, UniformSubstitution(0.5).kernel(space.allowed), 25, seed=2)
    index = index_prefixes(batch.tokens, batch.num_steps, space.num_actions, finished=True)
    outputs = network(torch.from_numpy(batch.tokens.astype(np.int64)), torch.from_numpy(index.rows))[index.inverse]
    for b in range(len(batch)):
        for t in range(batch.num_steps[b] + 1):
            prefix = batch.tokens[b, :t]
            expected = mlp_outputs(network, prefix)
            np.testing.assert_allclose(outputs[b, t].numpy(), expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(stepped(network, prefix).numpy(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_many_parents_are_extended_at_once():
    space = fixed_space(3, 4)
    network = network_of(space, (2, 3))
    rng, state, prefixes = np.random.default_rng(0), network.start(), [()]
    for _ in range(space.max_length):
        parents, tokens = rng.integers(len(prefixes), size=6), rng.integers(3, size=6)
        state = network.extend(state, torch.from_numpy(parents), torch.from_numpy(tokens))
        prefixes = [(*prefixes[p], int(x)) for p, x in zip(parents, tokens, strict=True)]
        expected = np.stack([mlp_outputs(network, prefix) for prefix in prefixes])
        np.testing.assert_allclose(network.outputs(state).numpy(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_single_layer_and_the_padding_row():
    space = fixed_space(2, 3)
    network = network_of(space, (2,), num_layers=1)
    network.embedding[-1] = 1e6  # the row of k-mers that would start before the sequence: never added
    np.testing.assert_allclose(stepped(network, np.asarray([1])).numpy(), mlp_outputs(network, [1]), rtol=1e-4)
    all_prefixes = network(torch.tensor([[1, 0, 1]]), torch.arange(4))
    np.testing.assert_allclose(all_prefixes[1].numpy(), mlp_outputs(network, [1]), rtol=1e-4)


def test_an_untrained_network_says_zero():
    network = build_network(fixed_space(4, 4), 3, MLPConfig(hidden_size=8))
    assert (network(torch.tensor([[0, 1, 2, 3]]), torch.arange(5)) == 0).all()


def test_kmers_are_chosen_from_the_alphabet_and_the_length():
    assert network_of(fixed_space(4, 8), "auto").kmer_sizes == (1, 2, 3, 4, 5, 6)
    assert network_of(fixed_space(4, 3), "auto").kmer_sizes == (1, 2, 3)
    assert network_of(fixed_space(20, 8), "auto").kmer_sizes == (1, 2)
    assert network_of(fixed_space(40, 8), "auto").kmer_sizes == (1, 2)
    assert network_of(fixed_space(70, 8), "auto").kmer_sizes == (1,)
    assert network_of(fixed_space(4, 3), (7, 3, 2, 3)).kmer_sizes == (1, 2, 3)


def test_too_many_embeddings_are_refused():
    with pytest.raises(ValueError, match=r"network\.kmer_sizes .* embeddings"):
        build_network(fixed_space(20, 50), 3, MLPConfig(kmer_sizes=(4,)))
