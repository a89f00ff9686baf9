"""Kubernetes manifests and the Dockerfile: schemas, linters, and what the schemas do not demand."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from data_pipeline.errors import ExitCode

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "launch" / "kubernetes").glob("*.yaml"))
TOOLS = Path(sys.executable).parent


def documents() -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        yield from yaml.safe_load_all(path.read_text())


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents():
        spec = document.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield document["kind"], spec["template"]["spec"]


def test_schemas() -> None:
    kinds = []
    for document in documents():
        # Called directly: the command line lets kinds without a schema pass with a warning.
        kubernetes_validate.validate(document, "1.32", strict=True)
        kinds.append(document["kind"])
    wanted = {"Job", "Service", "Deployment", "CronJob", "ServiceAccount", "NetworkPolicy", "ConfigMap"}
    assert set(kinds) == wanted


def test_schemas_are_strict() -> None:
    document = next(document for document in documents() if document["kind"] == "Job")
    document["spec"]["paralelism"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        kubernetes_validate.validate(document, "1.32", strict=True)


@pytest.mark.parametrize(
    "command",
    [
        ["yamllint", "--strict", "--config-file", ".yamllint.yaml", "launch/kubernetes"],
        ["hadolint", "--config", ".hadolint.yaml", "Dockerfile"],
    ],
    ids=lambda command: command[0],
)
def test_linters(command: list[str]) -> None:
    done = subprocess.run(
        [TOOLS / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pods_run_with_the_least_rights() -> None:
    pods = list(pod_specs())
    assert [kind for kind, _ in pods] == ["CronJob", "Deployment", "Job"]
    for _, pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["terminationGracePeriodSeconds"] >= 60
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert {"/tmp", "/home/ddpm"} <= set(mounted)  # the root file system is read-only


def test_jobs_know_our_exit_codes() -> None:
    jobs = [spec for spec in map(job_spec, documents()) if spec]
    assert len(jobs) == 2
    for spec in jobs:
        pod = spec["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # or Kubernetes refuses the policy
        rules = spec["podFailurePolicy"]["rules"]
        by_code = {
            code: rule["action"]
            for rule in rules
            for code in rule.get("onExitCodes", {"values": []})["values"]
        }
        assert by_code == {ExitCode.REQUEUE: "Ignore", ExitCode.USER_MISTAKE: "FailJob"}
        names = {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule}
        assert names == {pod["containers"][0]["name"]}


def job_spec(document: dict[str, Any]) -> dict[str, Any] | None:
    spec = document.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    return spec if "podFailurePolicy" in spec else None


def test_training_pods_find_each_other() -> None:
    by_kind = {d["kind"]: d for d in documents() if d["metadata"]["name"] == "ddpm-train"}
    job, service = by_kind["Job"], by_kind["Service"]
    pod = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    arguments = pod["spec"]["containers"][0]["args"]
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    assert options["--num_nodes"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert options["--master_addr"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"


def test_images_start_the_same_scripts_unprivileged() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for script in ("train", "eval"):
        assert f'ENTRYPOINT ["/usr/bin/tini", "--", "/opt/ddpm-foundry/launch/{script}.sh"]' in lines
    assert lines.count("USER 10001:10001") == 2
