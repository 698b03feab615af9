"""Checks a PyTorchJob manifest against the part of the training operator's schema that we use, and against our rules.

    .venv/bin/python scripts/check_manifest.py scripts/kubernetes/pytorchjob.yaml

Prints one line a problem; exit status 1 if there is one. Unknown keys are problems: the operator would drop them.
Source: the types of kubeflow/training-operator, pkg/apis/kubeflow.org/v1, and of Kubernetes' core/v1.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from lost.config.compose import compose
from lost.utils.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=1, strict=True)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$")]
# A tag that says which build it is, or a digest.
Image = Annotated[str, Field(pattern=r"^[^\s:]+(:[0-9]+/[^\s:]+)?(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$")]
GPU = "nvidia.com/gpu"
SHUTDOWN_OPTION = "--shutdown-timeout="


class Part(BaseModel):
    """A mapping of the manifest; its keys are the fields in camelCase and no others."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", regex_engine="python-re")


class KeyValue(Part):
    key: str
    value: str


class EnvironmentVariable(Part):
    name: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
    value: Annotated[str, Field(strict=True)]


class ElasticPolicy(Part):
    rdzv_backend: Literal["c10d"]
    rdzv_port: Annotated[int, Field(ge=1024, le=65535)]
    min_replicas: Count
    max_replicas: Count
    n_proc_per_node: Count
    max_restarts: Count
    rdzv_conf: list[KeyValue] = []


class RunPolicy(Part):
    backoff_limit: Count
    clean_pod_policy: Literal["All", "Running", "None"]


class Requests(Part):
    cpu: Quantity
    memory: Quantity


class Limits(Part):
    memory: Quantity
    gpus: Count = Field(alias=GPU)


class Resources(Part):
    requests: Requests
    limits: Limits


class VolumeMount(Part):
    name: Name
    mount_path: Annotated[str, Field(pattern="^/")]


class Container(Part):
    # The operator finds its container by this name.
    name: Literal["pytorch"]
    image: Image
    command: list[str]
    args: list[str]
    env: list[EnvironmentVariable]
    resources: Resources
    volume_mounts: list[VolumeMount]


class ClaimSource(Part):
    claim_name: Name


class EmptyDirSource(Part):
    medium: Literal["Memory"]
    size_limit: Quantity


class Volume(Part):
    name: Name
    persistent_volume_claim: ClaimSource | None = None
    empty_dir: EmptyDirSource | None = None


class SecurityContext(Part):
    run_as_non_root: Literal[True]
    run_as_user: Count
    run_as_group: Count
    fs_group: Count


class PodSpec(Part):
    termination_grace_period_seconds: Count
    security_context: SecurityContext
    containers: Annotated[list[Container], Field(min_length=1, max_length=1)]
    volumes: list[Volume]


class PodTemplate(Part):
    spec: PodSpec


class Replicas(Part):
    replicas: Count
    # torchrun exits with 1 after every kind of failure, which ExitCode takes for permanent.
    restart_policy: Literal["OnFailure"]
    template: PodTemplate


class ReplicaSpecs(Part):
    workers: Replicas = Field(alias="Worker")


class JobSpec(Part):
    elastic_policy: ElasticPolicy
    run_policy: RunPolicy
    pytorch_replica_specs: ReplicaSpecs


class Metadata(Part):
    name: Name
    namespace: Name | None = None
    labels: dict[str, str] = {}


class PyTorchJob(Part):
    """The manifest; the rules between its parts are checked once each part is right."""

    api_version: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Metadata
    spec: JobSpec

    @model_validator(mode="after")
    def parts_agree(self) -> "PyTorchJob":
        problems = [*replica_problems(self.spec), *pod_problems(self.spec.pytorch_replica_specs.workers.template.spec)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def replica_problems(spec: JobSpec) -> list[str]:
    """Rules between numbers of pods and of processes."""
    policy, workers = spec.elastic_policy, spec.pytorch_replica_specs.workers
    problems = []
    if not policy.min_replicas <= workers.replicas <= policy.max_replicas:
        problems.append(
            f"Worker.replicas = {workers.replicas} is not between minReplicas = {policy.min_replicas}"
            f" and maxReplicas = {policy.max_replicas}"
        )
    num_gpus = workers.template.spec.containers[0].resources.limits.gpus
    if num_gpus != policy.n_proc_per_node:
        problems.append(
            f"nProcPerNode = {policy.n_proc_per_node}, but a pod has {num_gpus} GPUs: use one process a GPU"
        )
    return problems


def pod_problems(pod: PodSpec) -> list[str]:
    """Rules inside a pod: its command, its environment, its volumes."""
    (container,) = pod.containers
    problems = command_problems(container, pod.termination_grace_period_seconds)
    if ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1") not in [(item.name, item.value) for item in container.env]:
        problems.append("env lacks TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which a new pod cannot join again")
    mounted, volumes = {mount.name for mount in container.volume_mounts}, {volume.name for volume in pod.volumes}
    if mounted != volumes:
        problems.append(f"volumes {sorted(volumes)} and volumeMounts {sorted(mounted)} differ")
    if "/dev/shm" not in {mount.mount_path for mount in container.volume_mounts}:
        problems.append("nothing is mounted at /dev/shm: the default of 64 MiB is too little for NCCL and the readers")
    for volume in pod.volumes:
        if (volume.persistent_volume_claim is None) == (volume.empty_dir is None):
            problems.append(f"volume {volume.name} must be either a persistentVolumeClaim or an emptyDir")
    return problems


def command_problems(container: Container, grace_seconds: int) -> list[str]:
    """`torchrun [options] -m lost pretrain [settings]`, with time to save and settings that `lost` accepts."""
    launch = ["-m", "lost", "pretrain"]
    positions = [index for index in range(len(container.args)) if container.args[index : index + 3] == launch]
    if container.command != ["torchrun"] or len(positions) != 1:
        return ["command and args must be torchrun [options] -m lost pretrain [settings]"]
    options, settings = container.args[: positions[0]], container.args[positions[0] + 3 :]
    seconds = [option.removeprefix(SHUTDOWN_OPTION) for option in options if option.startswith(SHUTDOWN_OPTION)]
    problems = []
    if len(seconds) != 1 or not seconds[0].isdigit() or int(seconds[0]) >= grace_seconds:
        problems.append(
            f"args need one {SHUTDOWN_OPTION}<seconds below terminationGracePeriodSeconds = {grace_seconds}>:"
            " a run that is asked to stop must have saved before the pod is killed"
        )
    mounts = [mount.mount_path for mount in container.volume_mounts if mount.mount_path != "/dev/shm"]
    try:
        run_dir = Path(compose("pretrain", settings).run_dir)
    except ConfigError as error:
        return [*problems, *error.problems]
    if not any(run_dir.is_relative_to(mount) for mount in mounts):
        problems.append(f"run_dir = {run_dir} is on no mounted volume: a new pod would not find its checkpoints")
    return problems


def problems_of(path: Path) -> list[str]:
    """What is wrong with a manifest, each with its dotted place."""
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        return [str(error)]
    if len(documents) != 1:
        return [f"{len(documents)} documents: must be one PyTorchJob"]
    try:
        PyTorchJob.model_validate(documents[0])
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, item['loc'])) or 'whole'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
    return []


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: check_manifest.py MANIFEST...", file=sys.stderr)
        return 2
    problems = [f"{name}: {problem}" for name in arguments for problem in problems_of(Path(name))]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
