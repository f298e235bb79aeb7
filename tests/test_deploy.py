"""What ships for clusters is valid: cluster.yaml by Ray's own functions, the rest by the documented fields."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent


def known(required: Sequence[str] = (), /, **fields: Any) -> dict[str, Any]:
    """A JSON schema of an object that has these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = known(cpu=TEXT, memory=TEXT, **{"nvidia.com/gpu": {"type": ["string", "integer"]}})
CONTAINER = known(
    ["name", "image"],
    name=TEXT,
    image=TEXT,
    ports={"type": "array", "items": known(["name", "containerPort"], name=TEXT, containerPort=COUNT)},
    resources=known(requests=QUANTITIES, limits=QUANTITIES),
    env={"type": "array"},
)
POD = known(
    ["spec"],
    metadata={"type": "object"},
    spec=known(
        ["containers"],
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        terminationGracePeriodSeconds=COUNT,
        nodeSelector=TEXTS,
        tolerations={"type": "array"},
    ),
)
# The fields of KubeRay's API reference, ray.io/v1.
HEAD = known(["template"], template=POD, rayStartParams=TEXTS, serviceType=TEXT, enableIngress=FLAG)
WORKERS = known(
    ["groupName", "template", "minReplicas", "maxReplicas"],
    groupName=TEXT,
    template=POD,
    rayStartParams=TEXTS,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    suspend=FLAG,
)
CLUSTER = known(
    ["headGroupSpec"],
    rayVersion=TEXT,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions={"type": "object"},
    gcsFaultToleranceOptions={"type": "object"},
    suspend=FLAG,
)
RAY_JOB = known(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=known(["name"], name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
    spec=known(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        rayClusterSpec=CLUSTER,
        clusterSelector=TEXTS,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterPodTemplate=POD,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        suspend=FLAG,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources=TEXT,
    ),
)


def ray_job() -> Any:
    """The manifest that ships."""
    return yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())


def test_cluster_yaml_is_valid() -> None:
    """By Ray's own functions of its cluster launcher."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))


def test_rayjob_has_the_documented_fields() -> None:
    """None that KubeRay does not know, none missing; replicas within their bounds, one image and version everywhere."""
    job = ray_job()
    jsonschema.validate(job, RAY_JOB)
    spec = job["spec"]["rayClusterSpec"]
    groups = spec["workerGroupSpecs"]
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)
    pods = [spec["headGroupSpec"]["template"], *(group["template"] for group in groups)]
    assert len({container["image"] for pod in pods for container in pod["spec"]["containers"]}) == 1
    image = (ROOT / "deploy/Dockerfile").read_text()
    assert f"rayproject/ray:{spec['rayVersion']}-py311" in image
    script = re.search(r"/home/ray/raystore/(\S+\.py)", job["spec"]["entrypoint"])
    assert script is not None and (ROOT / script.group(1)).exists()


@pytest.mark.parametrize("where", [[], ["rayClusterSpec"], ["rayClusterSpec", "headGroupSpec"]], ids=str)
def test_the_schema_refuses_what_is_not_documented(where: list[str]) -> None:
    """A misspelt field is found at every level."""
    job = ray_job()
    part = job["spec"]
    for name in where:
        part = part[name]
    part["entryPoint"] = "python x.py"
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        jsonschema.validate(job, RAY_JOB)
