"""Confounds: nuisance regression and scrubbing as nilearn does them, with the mean kept and time going on."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from umbrella_jax.config.schema import ConfoundsConfig, DataConfig, ModalityConfig
from umbrella_jax.data.cache import VolumeCache
from umbrella_jax.data.confounds import check_confounds
from umbrella_jax.data.volume import count_windows, load_volume, open_volume, restore
from umbrella_jax.errors import ConfigError, DataError

SHAPE, FRAMES, TR = (3, 2, 2), 80, 0.8
NAME = "sub-1_task-rest_run-2"
MOTION = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
FMRI = ModalityConfig(size=(*SHAPE, 8), patch=(3, 2, 2, 4), scaling="none", background="nonpositive")
SPIKES = (0, 1, 30, 79)
"""Frames with motion: two at the beginning, one inside, one at the end."""


def confounds(**changed: object) -> ModalityConfig:
    return replace(FMRI, confounds=ConfoundsConfig(**{"scrub": 0, **changed}))


@pytest.fixture(scope="module")
def table() -> dict[str, np.ndarray]:
    """The columns of a table of confounds, drawn at random but for the displacement."""
    rng = np.random.default_rng(0)
    names = [name + end for name in MOTION for end in ("", "_derivative1", "_power2", "_derivative1_power2")]
    names += ["csf", "white_matter", "global_signal", "other_00", "other_01"]
    columns = {name: rng.normal(size=FRAMES) for name in names}
    columns |= {f"cosine{k:02}": np.cos(np.pi * (np.arange(FRAMES) + 0.5) * (k + 1) / FRAMES) for k in range(2)}
    columns["framewise_displacement"] = np.where(np.isin(np.arange(FRAMES), SPIKES), 0.9, 0.1)
    return columns | {"std_dvars": np.ones(FRAMES)}


@pytest.fixture
def run(table: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """A run with signals of its confounds about 100, a voxel that is constant, and its table."""
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(*SHAPE, 3)) @ np.stack([table["trans_x"], table["csf"], table["cosine00"]])
    data = 100 + mixed + rng.normal(size=(*SHAPE, FRAMES)) + np.linspace(0, 5, FRAMES)
    data[0, 0, 0] = 0
    image = nib.Nifti1Image(data.astype(np.float32), np.eye(4))
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = TR
    path = tmp_path / f"{NAME}_space-MNI_res-2_desc-preproc_bold.nii.gz"
    nib.save(image, path)
    write_table(tmp_path / f"{NAME}_desc-confounds_timeseries.tsv", table)
    return path


def write_table(file: Path, columns: dict[str, np.ndarray]) -> None:
    def cell(name: str, frame: int) -> str:
        missing = frame == 0 and ("derivative" in name or name in ("framewise_displacement", "std_dvars"))
        return "n/a" if missing else f"{columns[name][frame]:.9g}"

    rows = ["\t".join(cell(name, frame) for name in columns) for frame in range(len(columns["csf"]))]
    file.write_text("\n".join(["\t".join(columns), *rows]) + "\n")


def nilearn_cleaned(run: Path, strategy: tuple[str, ...], **options: object) -> tuple[np.ndarray, np.ndarray]:
    """Return what nilearn makes of the run by itself, [frames, voxels] with the run's mean, and the frames it keeps."""
    from nilearn.interfaces.fmriprep import load_confounds
    from nilearn.signal import clean

    selected, mask = load_confounds(str(run), strategy=strategy, scrub=0)
    signals = np.asarray(nib.load(run).dataobj, np.float64).reshape(-1, FRAMES).T
    kept = np.arange(FRAMES) if mask is None else mask
    cleaned = clean(
        signals, confounds=selected, sample_mask=mask, standardize=None, t_r=TR, **{"filter": False, **options}
    )
    return cleaned - cleaned.mean(axis=0) + signals[kept].mean(axis=0), kept


def test_regression_is_nilearns_with_the_mean_kept(run: Path) -> None:
    shown = open_volume(run, confounds())
    expected, _ = nilearn_cleaned(run, ("motion", "high_pass", "wm_csf"))
    np.testing.assert_allclose(shown.read(slice(None)).reshape(-1, FRAMES).T, expected, atol=1e-4)
    stored = np.asarray(nib.load(run).dataobj)
    np.testing.assert_allclose(shown.read(slice(None)).mean(-1), stored.mean(-1), rtol=1e-6)
    assert not shown.read(slice(None))[0, 0, 0].any()  # background stays background
    assert shown.read(slice(None)).std(-1).sum() < 0.8 * stored.std(-1).sum()


def test_a_high_pass_filter_is_nilearns(run: Path) -> None:
    shown = open_volume(run, confounds(strategy=("motion",), high_pass=0.02))
    expected, _ = nilearn_cleaned(run, ("motion",), filter="butterworth", high_pass=0.02)
    np.testing.assert_allclose(shown.read(slice(None)).reshape(-1, FRAMES).T, expected, atol=1e-4)


def test_scrubbed_frames_are_left_out_of_the_regression_and_filled(run: Path, table: dict[str, np.ndarray]) -> None:
    write_table(
        run.parent / f"{NAME}_desc-confounds_timeseries.tsv",
        table | {"non_steady_state_outlier00": np.eye(FRAMES)[0]},
    )
    config = confounds(strategy=("motion", "scrub"), fd_threshold=0.5)
    shown = open_volume(run, config)
    expected, kept = nilearn_cleaned(run, ("motion", "scrub"))
    assert kept.tolist() == [frame for frame in range(FRAMES) if frame not in SPIKES]
    assert shown.shape[3] == 77  # without the two frames at the beginning and the one at the end
    voxels = shown.read(slice(None)).reshape(-1, 77).T
    np.testing.assert_allclose(voxels[kept - 2], expected, atol=1e-4)
    np.testing.assert_allclose(voxels[28], (voxels[27] + voxels[29]) / 2, rtol=1e-5)
    assert count_windows(shown, config) == 9
    values = np.ones(FMRI.size, np.float32)
    back = restore(run, values, config, 3)  # frames 24 to 31 of the cleaned run, so 26 to 33 of the file
    assert back.sum() == pytest.approx(values.sum())
    assert back[0, 0, 0].tolist() == pytest.approx([0] * 26 + [1, 1, 1, 1.5, 0, 1.5, 1, 1] + [0] * 46)


def test_columns_of_a_table_at_another_place(run: Path, table: dict[str, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    write_table(tmp_path / "tables" / "1-2.tsv", table)
    config = confounds(strategy=(), columns=("trans_?", "csf"), pattern="tables/{sub}-{run}.tsv", detrend=False)
    from nilearn.signal import clean

    signals = np.asarray(nib.load(run).dataobj, np.float64).reshape(-1, FRAMES).T
    own = np.stack([table[name] for name in ("trans_x", "trans_y", "trans_z", "csf")], axis=1)
    without = clean(signals, confounds=own, detrend=False, standardize=None, filter=False)
    shown = open_volume(run, config).read(slice(None)).reshape(-1, FRAMES).T
    np.testing.assert_allclose(shown, without - without.mean(0) + signals.mean(0), atol=1e-4)


def test_cleaned_runs_are_resampled_and_cached_with_their_table(
    run: Path, table: dict[str, np.ndarray], tmp_path: Path
) -> None:
    config = replace(confounds(), tr=2.0)
    cache = VolumeCache(tmp_path / "cache", strict=True)
    assert cache.check(run, config) == count_windows(open_volume(run, config), config) == 4
    np.testing.assert_array_equal(cache.load(run, config, 2), load_volume(run, config, 2))
    (beside,) = cache.companions(run, config)
    assert beside[0].name == f"{NAME}_desc-confounds_timeseries.tsv"
    moved = confounds(pattern=beside[0].name, max_scrubbed=0.9)  # neither changes a voxel
    again = VolumeCache(tmp_path / "cache")
    again.check(run, replace(moved, tr=2.0))
    assert (again.num_found, again.num_made) == (4, 0)
    assert moved.meaning == confounds().meaning != confounds(motion="basic").meaning
    write_table(beside[0], table | {"csf": table["white_matter"]})
    again = VolumeCache(tmp_path / "cache")
    again.check(run, config)
    assert (again.num_found, again.num_made) == (0, 4)


def test_refuses_tables_that_do_not_fit(run: Path, table: dict[str, np.ndarray], tmp_path: Path) -> None:
    file = tmp_path / f"{NAME}_desc-confounds_timeseries.tsv"
    for config, message in [
        (confounds(columns=("nothing*",)), r"timeseries.tsv: no column nothing\*; it has trans_x"),
        (confounds(strategy=("high_pass", "compcor")), "nilearn cannot take high_pass, compcor from it"),
        (confounds(strategy=("scrub",), max_scrubbed=0.01), "3 of 80 frames would be scrubbed, more than 1%"),
        (
            confounds(pattern="{acq}.tsv"),
            r"no acq, as in confounds.pattern \{acq\}.tsv; expected some of \{name\}",
        ),
    ]:
        with pytest.raises((DataError, ConfigError), match=message):
            open_volume(run, config)
    write_table(file, {name: column[:70] for name, column in table.items()})
    with pytest.raises(DataError, match="70 rows; expected one for each of the run's 80 frames"):
        open_volume(run, confounds())
    file.unlink()
    with pytest.raises(DataError, match=r"no table of confounds; expected \*_desc-confounds_timeseries.tsv beside it"):
        open_volume(run, confounds())


@pytest.mark.parametrize(
    ("column", "frames", "cell", "config", "message"),
    [
        ("trans_x", [30], "n/a", {}, "trans_x: missing values after the first frame"),
        ("trans_x_derivative1", [1], "", {}, "trans_x_derivative1: missing values after the first frame"),
        ("csf", [4], "bad", {}, "tsv:6: csf: expected a number or n/a, got 'bad'"),
        ("csf", [4], "inf", {"strategy": (), "columns": ("csf",)}, "tsv:6: csf: expected a number or n/a, got 'inf'"),
        ("framewise_displacement", [7], "n/a", {"strategy": ("scrub",)}, "framewise_displacement: missing values"),
        (
            "framewise_displacement",
            range(2, FRAMES),
            "9",
            {"strategy": ("motion", "scrub"), "max_scrubbed": 1.0},
            "24 regressors for 1 frame that scrubbing keeps would leave nothing; leave the run out",
        ),
        ("csf", [4], "0", {"strategy": (), "high_pass": 0.7}, r"below 0\.625 Hz; confounds\.high_pass is 0\.7 Hz"),
        (None, [], "", {}, "one column, 'trans_x,trans_x_derivative1,.*; columns must be separated by tabs"),
    ],
)
def test_refuses_cells_that_cannot_be_regressed_out(
    column: str | None, frames: Sequence[int], cell: str, config: dict[str, object], message: str, run: Path
) -> None:
    file = run.parent / f"{NAME}_desc-confounds_timeseries.tsv"
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    for frame in frames:
        rows[frame + 1][rows[0].index(column)] = cell
    file.write_text("\n".join(("\t" if column else ",").join(row) for row in rows) + "\n\n")
    with pytest.raises(DataError, match=message):
        open_volume(run, confounds(**config))


def test_a_filter_needs_nineteen_frames(table: dict[str, np.ndarray], run: Path) -> None:
    image = nib.load(run)
    file = run.parent / f"{NAME}_desc-confounds_timeseries.tsv"
    config = confounds(strategy=(), high_pass=0.1)
    for frames in (19, 18):
        nib.save(image.slicer[..., :frames], run)
        write_table(file, {name: column[:frames] for name, column in table.items()})
        if frames == 19:
            assert np.isfinite(open_volume(run, config).read(slice(None))).all()
    with pytest.raises(DataError, match=r"its run has 18 frames; confounds\.high_pass needs 19 or more"):
        open_volume(run, config)


def test_refuses_a_run_without_cache_and_options_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"model.modalities.fMRI.confounds: .* data.cache \(--cache DIR\)"):
        check_confounds({"fMRI": confounds()}, DataConfig().cache)
    check_confounds({"fMRI": confounds()}, "cache")
    check_confounds({"fMRI": FMRI}, None)
    with pytest.raises(ConfigError, match="choose one of them"):
        ConfoundsConfig(high_pass=0.01)
    for pattern in ("../{sub.tsv", "{sub[0]}.tsv", "{}.tsv", "{sub!r}.tsv"):
        with pytest.raises(ConfigError, match=r"pattern: .* expected the name of one entity in each pair of braces"):
            ConfoundsConfig(pattern=pattern)
    with pytest.raises(ConfigError, match="confounds: only 4D runs have them"):
        ModalityConfig(size=SHAPE, patch=SHAPE, confounds=ConfoundsConfig())
    assert json.loads(json.dumps(confounds().meaning))["confounds"]["motion"] == "full"
