"""Initial weights of a patch embedding meet their definitions, checked with the patch embedding itself."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.ndimage import map_coordinates

from convert.patch_embed_init import inflate_patch_embed, resample_patch_embed
from umbrella_jax.config.schema import ModalityConfig
from umbrella_jax.errors import CheckpointError
from umbrella_jax.models.patch_embed import PatchEmbed

E, C, P, G = 6, 3, 5, 7  # hidden size, colours, side of the image's patch, side of its grid


def modality(patch, grid):
    """Return a modality with one voxel more than the patches cover along every axis with a patch longer than 1."""
    return ModalityConfig(size=tuple(g * p + (p > 1) for g, p in zip(grid, patch, strict=True)), patch=patch)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def image(rng):
    """Return kernel, bias and positions of a SigLIP."""
    shapes = (E, C, P, P), (E,), (G * G, E)
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def trained(rng, config):
    """Return weight, bias and positions of a patch embedding; each contains a −0."""
    shapes = (E, config.patch_dim), (E,), (1, config.num_patches, E)
    arrays = tuple(rng.normal(size=s).astype(np.float32) for s in shapes)
    for array in arrays:
        array.flat[0] = -0.0
    return arrays


def embed(start, config, volumes):
    """Embed volumes [M, *size] as [M, *grid, E], with `start` as parameters of the model's patch embedding."""
    abstract = nnx.eval_shape(lambda: PatchEmbed({"T1": config}, E, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)
    shapes = flatten_dict(nnx.to_pure_dict(params), sep=".")
    assert shapes.keys() == {f"T1_{key}" for key in start}
    for key, array in start.items():
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.shape == shapes[f"T1_{key}"].shape
    module = nnx.merge(graphdef, unflatten_dict({f"T1_{key}": jnp.asarray(a) for key, a in start.items()}, sep="."))
    return np.asarray(module("T1", jnp.asarray(volumes, np.float32))).reshape(len(volumes), *config.grid, E)


def interpolate(x, shape):
    """Interpolate linearly with scipy in any number of dimensions: half-pixel centres, clamped edges."""
    axes = [(np.arange(new) + 0.5) * old / new - 0.5 for old, new in zip(x.shape, shape, strict=True)]
    return map_coordinates(x.astype(np.float64), np.meshgrid(*axes, indexing="ij"), order=1, mode="nearest")


def interpolated(table, old, new):
    """Interpolate each channel of a table [N, E] from grid `old` to [*new, E]."""
    return np.stack([interpolate(channel.reshape(old), new) for channel in table.T], -1)


def resize_matrix(old, new):
    """Return B [∏new, ∏old] for whole patches, one column per voxel."""
    voxels = np.eye(int(np.prod(old))).reshape(-1, *old)
    return np.stack([interpolate(v, new).ravel() for v in voxels], -1)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 9), (11, 3), (14, 20)])
def test_reference_is_torchs_interpolation(rng, size):
    x = rng.normal(size=(5, 7))
    expected = torch.nn.functional.interpolate(torch.from_numpy(x)[None, None], size, mode="bilinear")[0, 0]
    close(interpolate(x, size), expected.numpy())


# --- inflate ---


@pytest.mark.parametrize(
    ("depth", "grid", "time"),
    [(3, (2, 4, 9), ()), (1, (3, G, G), ()), (4, (3, 8, 5, 2), (3,)), (2, (1, G, 3, 4), (1,))],
)
def test_a_volume_constant_along_depth_and_time_embeds_as_its_plane_in_2d(rng, image, depth, grid, time):
    kernel, bias, table = image
    config = modality((depth, P, P, *time), grid)
    plane = rng.normal(size=(2, *config.size[1:3])).astype(np.float32)
    rgb = torch.from_numpy(plane)[:, None].expand(-1, C, -1, -1)
    conv = torch.nn.functional.conv2d(rgb, torch.from_numpy(kernel), torch.from_numpy(bias), stride=P)
    expected = conv.permute(0, 2, 3, 1).numpy() + interpolated(table, (G, G), grid[1:3])
    if time:
        plane, expected = plane[..., None], expected[:, :, :, None]
    volumes = np.broadcast_to(plane[:, None], (2, *config.size))
    features = embed(inflate_patch_embed(kernel, bias, table, config), config, volumes)
    close(features, np.broadcast_to(expected[:, None], features.shape))


@pytest.mark.parametrize("plane", [(7, 11), (P, 6), (10, 5)])
@pytest.mark.parametrize("time", [(), (3,)])
def test_an_upsampled_patch_embeds_as_the_patch(rng, image, plane, time):
    kernel, bias, table = image
    config = modality((4, *plane, *time), (1,) * (3 + len(time)))
    patches = rng.normal(size=(3, P, P))
    volumes = np.zeros((3, *config.size))
    for volume, patch in zip(volumes, patches, strict=True):
        upsampled = interpolate(patch, plane)
        volume[tuple(map(slice, config.patch))] = upsampled[None, ..., None] if time else upsampled
    expected = np.einsum("echw,mhw->me", kernel, patches) + bias
    found = embed(inflate_patch_embed(kernel, bias, np.zeros_like(table), config), config, volumes)
    close(found.reshape(3, E), expected)


@pytest.mark.parametrize("plane", [(3, 4), (2, P), (1, 3), (3, 8), (9, 4)])
def test_smaller_patch_is_the_nearest_response_to_white_noise(image, plane):
    kernel, bias, table = image
    depth, time = 3, 2
    start = inflate_patch_embed(kernel, bias, table, modality((depth, *plane, time), (2, 3, 4, 2)))
    weight = start["proj.weight"].reshape(E, depth, -1, time)
    close(weight, np.broadcast_to(weight[:, :1, :, :1], weight.shape))
    found, wanted = weight.sum((1, 3)).T, kernel.sum(1).reshape(E, -1).T  # [∏plane, E], [P·P, E]
    # E[(⟨x, w⟩ − ⟨B·x, w'⟩)²] over white x is |w − Bᵀ·w'|²
    resize = resize_matrix((P, P), plane)
    close(resize @ (resize.T @ found - wanted), 0)
    close(found, np.linalg.lstsq(resize.T, wanted)[0])  # the smallest of many solutions if an axis grows


@pytest.mark.parametrize("grid", [(2, 4, 9), (3, 15, 2), (2, 3, 11, 4)])
def test_linear_positions_stay_linear_away_from_the_edges(rng, image, grid):
    kernel, bias, _ = image
    offset, down, right = rng.normal(size=(3, E))
    rows, columns = np.mgrid[:G, :G].reshape(2, -1, 1)
    config = modality((2,) * len(grid), grid)
    positions = inflate_patch_embed(kernel, bias, offset + rows * down + columns * right, config)[
        "positional_embeddings"
    ]
    positions = positions.reshape(*grid, E)
    if len(grid) == 4:
        close(positions, np.broadcast_to(positions[:, :, :, :1], positions.shape))
        positions = positions[:, :, :, 0]
    h, w = ((np.arange(n) + 0.5) * G / n - 0.5 for n in grid[1:3])
    expected = offset + h[:, None, None] * down + w[:, None] * right
    inside = np.ix_((h >= 0) & (h <= G - 1), (w >= 0) & (w <= G - 1))
    assert expected[inside].size
    for depth in positions:
        close(depth[inside], expected[inside])


@pytest.mark.parametrize("grid", [(3, G, G), (3, G, G, 2)])
def test_positions_of_the_same_plane_are_repeated_bit_for_bit(image, grid):
    kernel, bias, table = image
    found = inflate_patch_embed(kernel, bias, table, modality((2,) * len(grid), grid))["positional_embeddings"].reshape(
        *grid, E
    )
    plane = table.reshape(1, G, G, *(1,) * (len(grid) - 3), E)
    np.testing.assert_array_equal(found, np.broadcast_to(plane, found.shape))


def test_table_that_is_no_square(image):
    kernel, bias, table = image
    with pytest.raises(CheckpointError, match=r"^positions of 48 patches: expected a square grid"):
        inflate_patch_embed(kernel, bias, table[1:], modality((2, 3, 4), (2, 3, 4)))


# --- resample ---

OLD = {3: modality((3, 5, 4), (2, 5, 3)), 4: modality((3, 4, 2, 5), (4, 2, 5, 3))}


@pytest.mark.parametrize("rank", [3, 4])
def test_same_sizes_are_the_same_bit_for_bit(rng, rank):
    old, arrays = OLD[rank], trained(rng, OLD[rank])
    same = resample_patch_embed(*arrays, old, old)
    assert [a.tobytes() for a in same.values()] == [a.tobytes() for a in arrays]
    other_grid = resample_patch_embed(*arrays, old, modality(old.patch, old.grid[::-1]))
    assert other_grid["proj.weight"].tobytes() == arrays[0].tobytes()
    other_patch = resample_patch_embed(*arrays, old, modality(old.patch[::-1], old.grid))
    assert other_patch["positional_embeddings"].tobytes() == arrays[2].tobytes()
    assert other_grid["proj.bias"].tobytes() == other_patch["proj.bias"].tobytes() == arrays[1].tobytes()


@pytest.mark.parametrize("patch", [(4, 6, 9), (3, 10, 4), (3, 5, 7), (5, 4, 3, 8), (3, 4, 2, 7), (6, 4, 3, 5)])
def test_upsampled_volumes_embed_as_the_volumes(rng, patch):
    old = OLD[len(patch)]
    new = modality(patch, old.grid)
    arrays = trained(rng, old)
    volumes, upsampled = np.zeros((2, *old.size)), np.zeros((2, *new.size))
    for index in np.ndindex(2, *old.grid):  # patch by patch, since resizing the volume would mix neighbours

        def place(sizes, index=index):
            return index[0], *(slice(i * p, i * p + p) for i, p in zip(index[1:], sizes, strict=True))

        volumes[place(old.patch)] = values = rng.normal(size=old.patch)
        upsampled[place(patch)] = interpolate(values, patch)
    expected = embed(dict(zip(resample_patch_embed(*arrays, old, old), arrays, strict=True)), old, volumes)
    largest = np.abs(expected).max()  # about 35: sums of hundreds of numbers
    features = embed(resample_patch_embed(*arrays, old, new), new, upsampled)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("patch", [(2, 3, 1), (2, 7, 3), (3, 2, 4), (2, 3, 1, 4), (4, 2, 3, 1)])
def test_smaller_patches_are_the_nearest_response_to_white_noise(rng, patch):
    old = OLD[len(patch)]
    weight, bias, table = trained(rng, old)
    found = resample_patch_embed(weight, bias, table, old, modality(patch, old.grid))["proj.weight"].T
    resize = resize_matrix(old.patch, patch)
    close(resize @ (resize.T @ found - weight.T), 0)
    close(found, np.linalg.lstsq(resize.T, weight.T)[0])


@pytest.mark.parametrize("grid", [(4, 3, 7), (1, 5, 9), (2, 11, 2), (3, 5, 2, 7), (4, 1, 9, 3), (8, 3, 4, 2)])
def test_positions_are_interpolated(rng, grid):
    old = OLD[len(grid)]
    weight, bias, table = trained(rng, old)
    found = resample_patch_embed(weight, bias, table, old, modality(old.patch, grid))["positional_embeddings"].reshape(
        *grid, E
    )
    close(found, interpolated(table[0], old.grid, grid))
    if len(grid) == 3:
        channels = torch.from_numpy(table.reshape(1, *old.grid, E)).permute(0, 4, 1, 2, 3)
        expected = torch.nn.functional.interpolate(channels, grid, mode="trilinear", align_corners=False)
        close(found, expected[0].permute(1, 2, 3, 0).numpy())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly(rng, image, dtype):
    new = modality((2, 7, 4), (3, 4, 5))
    volume = [a.astype(dtype) for a in trained(rng, OLD[3])]
    plane = [a.astype(dtype) for a in image]
    for function, arrays, args in ((resample_patch_embed, volume, (OLD[3], new)), (inflate_patch_embed, plane, (new,))):
        half, full = function(*arrays, *args), function(*(a.astype(np.float32) for a in arrays), *args)
        for key in full:
            assert half[key].dtype == np.float32
            np.testing.assert_array_equal(half[key], full[key])


def test_one_layout_for_every_result(rng):
    """Only the last axis changes and the others have length 1, so a transposition would stay a view."""
    old, new = modality((1, 1, 4), (2, 1, 1)), modality((1, 1, 7), (3, 1, 1))
    start = resample_patch_embed(*trained(rng, old), old, new)
    assert all(array.flags.c_contiguous for array in start.values())


@pytest.mark.parametrize(("old", "new"), [(3, 4), (4, 3)])
def test_other_ranks(rng, old, new):
    with pytest.raises(CheckpointError, match=rf"^patch embedding: expected {new}D .* found {old}D .*; start from"):
        resample_patch_embed(*trained(rng, OLD[old]), OLD[old], OLD[new])
