"""The shell scripts: both grammars, linters, and whom launch/train.sh takes itself for."""

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.sh"
EVAL = ROOT / "launch" / "eval.sh"
BASH = [*sorted(ROOT.glob("launch/*.sh")), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
SBATCH = sorted(ROOT.glob("launch/slurm/*.sbatch"))

# Stands for Python on PATH: prints what it was asked to run and the rank it was given.
SHOW = """#!/bin/sh
echo "$*"
echo "rank=$RANK local=$LOCAL_RANK/$LOCAL_WORLD_SIZE world=$WORLD_SIZE at=$MASTER_ADDR:$MASTER_PORT"
"""
STEP = {  # what srun gives the third of four tasks, one per node
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[7-10]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


class Shell:
    """Runs scripts with fake programs on PATH and a bare environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program("python3", SHOW)
        asked = "[ \"$*\" = 'show hostnames n[7-10]' ]"
        self.program("scontrol", f"#!/bin/sh\n{asked} && printf 'n7\\nn8\\nn9\\nn10\\n'\n")

    def program(self, name: str, text: str) -> None:
        """Put a program on PATH."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def run(
        self, script: Path | str, *arguments: str, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a script; VIRTUAL_ENV makes it look for Python on PATH."""
        full = {"PATH": f"{self.folder}:/usr/bin:/bin", "VIRTUAL_ENV": "somewhere", **(env or {})}
        return subprocess.run(
            [str(script), *arguments], env=full, cwd=self.folder, capture_output=True, text=True, check=False
        )

    def lines(self, script: Path | str, *arguments: str, env: dict[str, str] | None = None) -> list[str]:
        """Return the lines a successful run printed."""
        done = self.run(script, *arguments, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.parametrize("script", [*BASH, *SBATCH], ids=lambda path: path.name)
def test_bash_grammar(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


def test_shellcheck() -> None:
    checker = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [checker, "--shell=bash", *BASH, *SBATCH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_python_grammar(tmp_path: Path) -> None:
    py_compile.compile(str(TRAIN), cfile=str(tmp_path / "train.pyc"), doraise=True)


ARGUMENTS = ("quickstart", "run=a b", "x='\"$HOME\"'")
PLAIN = "-u -m trainer {} quickstart run=a b x='\"$HOME\"'"


def test_a_person_is_answered_by_the_supervisor(shell: Shell) -> None:
    assert shell.lines(TRAIN, *ARGUMENTS)[0] == PLAIN.format("supervise")
    assert shell.lines(TRAIN)[0] == "-u -m trainer supervise"


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_launchers_get_a_worker(shell: Shell, name: str) -> None:
    # Even inside a Slurm step: the launcher that node supervisors start sets the ranks.
    environment = {name: "1", **STEP}
    assert shell.lines(TRAIN, "--local_rank=1", *ARGUMENTS, env=environment)[0] == PLAIN.format("worker")


def test_run_by_python_it_stays_with_that_python(shell: Shell) -> None:
    # The head is read by the real Python; the Python it hands on is seen by the process it execs.
    recorder = shell.folder / "bash"
    shell.program("bash", '#!/bin/sh\necho "$DDPM_PYTHON $*"\n')
    done = subprocess.run(
        [sys.executable, "-u", TRAIN, "--local_rank=0", *ARGUMENTS],
        env={"PATH": str(shell.folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert recorder.exists()
    assert done.stdout == f"{sys.executable} {TRAIN} --local_rank=0 {' '.join(ARGUMENTS)}\n"


def test_chosen_python_wins(shell: Shell) -> None:
    shell.program("other", '#!/bin/sh\necho other "$@"\n')
    assert shell.lines(TRAIN, env={"DDPM_PYTHON": "other"}) == ["other -u -m trainer supervise"]
    assert shell.lines(EVAL, "RUN", env={"DDPM_PYTHON": "other"}) == ["other -u -m launch.cli eval watch RUN"]


def test_one_slurm_task_per_node_is_a_node_supervisor(shell: Shell) -> None:
    placed = "--node_rank 2 --num_nodes 4 --master_addr n7 --master_port 22977"
    assert shell.lines(TRAIN, "r", env=STEP)[0] == f"-u -m trainer supervise {placed} r"
    chosen = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert "--master_addr 10.0.0.1 --master_port 29500" in shell.lines(TRAIN, "r", env=chosen)[0]


def test_steps_of_a_job_use_different_ports(shell: Shell) -> None:
    first, second = (shell.lines(TRAIN, env={**STEP, "SLURM_STEP_ID": step})[0] for step in ("0", "1"))
    assert first != second


@pytest.mark.parametrize(
    ("layout", "node", "local"), [("8(x4)", 0, 8), ("8(x4)", 3, 8), ("8,4(x2),2", 2, 4), ("8,4(x2),2", 3, 2)]
)
def test_one_slurm_task_per_device_is_a_worker(shell: Shell, layout: str, node: int, local: int) -> None:
    environment = {
        **STEP,
        "SLURM_STEP_NUM_TASKS": "18",
        "SLURM_STEP_TASKS_PER_NODE": layout,
        "SLURM_NODEID": str(node),
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }
    command, rank = shell.lines(TRAIN, "r", env=environment)
    assert command == "-u -m trainer worker r"
    assert rank == f"rank=5 local=1/{local} world=18 at=n7:22977"


@pytest.mark.parametrize("step", ["", "batch", "4294967291", "4294967290"])
def test_the_shell_of_sbatch_is_a_person(shell: Shell, step: str) -> None:
    environment = {**STEP, "SLURM_STEP_ID": step, "SLURM_PROCID": "0"}
    assert shell.lines(TRAIN, *ARGUMENTS, env=environment)[0] == PLAIN.format("supervise")


def test_eval_alone_and_as_a_team(shell: Shell) -> None:
    assert shell.lines(EVAL, "a b", "--poll", "1")[0] == "-u -m launch.cli eval watch a b --poll 1"
    team = "-u -m torch.distributed.run --standalone --nproc-per-node 4 -m launch.cli eval watch R"
    assert shell.lines(EVAL, "R", env={"EVAL_PROCESSES": "4"})[0] == team
    for wrong in ("0", "-1", "two", "1.5"):
        done = shell.run(EVAL, "R", env={"EVAL_PROCESSES": wrong})
        assert done.returncode == 2
        assert "EVAL_PROCESSES" in done.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, None, False),
        (75, None, True),
        (75, "99", True),
        (75, "100", False),
        (1, None, False),
        (2, "3", False),
    ],
)
@pytest.mark.parametrize("script", SBATCH, ids=lambda path: path.name)
def test_sbatch_requeues_only_when_asked_and_not_for_ever(
    shell: Shell, script: Path, code: int, restarts: str | None, requeued: bool
) -> None:
    shell.program("srun", f'#!/bin/sh\necho "srun $*"\nexit {code}\n')
    shell.program("scontrol", '#!/bin/sh\necho "scontrol $*"\n')
    environment = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "6"}
    if restarts is not None:
        environment["SLURM_RESTART_COUNT"] = restarts
    spooled = shell.folder / "slurm_script"  # Slurm runs a copy
    spooled.write_text(script.read_text())
    spooled.chmod(0o755)
    done = shell.run(spooled, "recipe", "run=a b", env=environment)
    assert done.returncode == code
    assert f"launch/{script.stem}.sh recipe run=a b" in done.stdout
    assert "--cpus-per-task=6" in done.stdout
    assert ("scontrol requeue 4711" in done.stdout) == requeued


def test_set_up_names_what_apt_must_install(shell: Shell) -> None:
    # A machine with a Python 3.11 without venv and headers, and no compiler.
    shell.program("python3", '#!/bin/sh\ncase "$2" in *version_info*) exit 0 ;; *) exit 1 ;; esac\n')
    for tool in ("bash", "dirname", "tr", "sort", "env"):
        (shell.folder / tool).symlink_to(Path("/usr/bin") / tool)
    done = shell.run(ROOT / "launch" / "venv.sh", "train", env={"PATH": str(shell.folder)})
    assert done.returncode == 2
    assert "apt-get install -y g++ python3-dev python3-venv" in done.stderr


def test_set_up_refuses_an_old_python_and_an_unknown_extra(shell: Shell) -> None:
    shell.program("old", "#!/bin/sh\nexit 1\n")
    done = shell.run(ROOT / "launch" / "venv.sh", "train", env={"PYTHON": "old"})
    assert (done.returncode, "PYTHON=old" in done.stderr) == (2, True)
    done = shell.run(ROOT / "launch" / "venv.sh", "trian")
    assert (done.returncode, "trian" in done.stderr) == (2, True)
