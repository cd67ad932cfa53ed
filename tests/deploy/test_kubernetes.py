"""The manifests: schemas of Kubernetes and KubeRay, strictly; what the overlays make of them; what no pod may lack."""

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy import crd_schema
from tla_service.config.loading import RunSettings, read_settings
from tla_service.tuning.settings import TuneSettings
from tla_service.tuning.space import Space

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
KUBECTL = shutil.which("kubectl")
OVERLAYS = [
    f"{overlay}/{part}" for overlay in ("gpu-cloud", "kind") for part in (".", "train", "sweep", "interactive", "serve")
]
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="overlays: put kubectl on the PATH")
OF_OPERATORS = ("kueue.x-k8s.io", "monitoring.coreos.com")  # schemas not at hand


def resources(text: str) -> list[dict[str, Any]]:
    return [resource for resource in yaml.safe_load_all(text) if resource]


def written() -> list[tuple[str, dict[str, Any]]]:
    files = sorted([*KUBERNETES.rglob("*.yaml"), *(ROOT / "deploy" / "observability").glob("kube-*.yaml")])
    return [
        (f"{path.relative_to(ROOT / 'deploy')}:{resource['kind']}/{resource['metadata']['name']}", resource)
        for path in files
        if path.name != "kustomization.yaml"
        for resource in resources(path.read_text())
    ]


WRITTEN = written()


def check(resource: dict[str, Any]) -> None:
    """Check against the schema of whoever defines it; pods within a KubeRay resource too, as pods."""
    group = resource["apiVersion"].partition("/")[0]
    if group in OF_OPERATORS:
        return
    if group == "ray.io":
        crd_schema.check(resource)
        for pod in pods(resource):
            kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, "1.33", strict=True)
    else:
        kubernetes_validate.validate(resource, "1.33", strict=True)


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Pod templates anywhere in a resource."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}) if isinstance(value.get("spec"), dict) else False:
            yield value
        for item in value.values():
            yield from pods(item)
    elif isinstance(value, list):
        for item in value:
            yield from pods(item)


@pytest.mark.parametrize(("name", "resource"), WRITTEN, ids=[name for name, _ in WRITTEN])
def test_it_fits_its_schema(name: str, resource: dict[str, Any]) -> None:
    check(resource)


def changed(kind: str, *path: Any, value: Any) -> dict[str, Any]:
    resource = copy.deepcopy(next(resource for _, resource in WRITTEN if resource["kind"] == kind))
    place: Any = resource
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return resource


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayJob", ("spec", "submisionMode"), "K8sJobMode"),
        ("RayJob", ("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ("RayCluster", ("spec", "authOptions", "mode"), "tokens"),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "maxReplica"), 4),
        ("RayService", ("spec", "serveConfig"), ""),
    ],
)  # fmt: skip
def test_a_wrong_kuberay_resource_does_not_fit(kind: str, path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(changed(kind, *path, value=value))


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "resource")),
        ("NetworkPolicy", ("spec", "podSelektor")),
        ("CronJob", ("spec", "jobTemplate", "spec", "template", "spec", "restartPolice")),
    ],
)
def test_a_misspelt_key_does_not_fit(kind: str, path: tuple[Any, ...]) -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        check(changed(kind, *path, value={}))


@pytest.fixture(scope="session")
def built() -> dict[str, list[dict[str, Any]]]:
    """What `kubectl kustomize` makes of every overlay."""
    if KUBECTL is None:
        pytest.skip("overlays: put kubectl on the PATH")
    return {
        name: resources(
            subprocess.run(
                [KUBECTL, "kustomize", str(KUBERNETES / "overlays" / name)], capture_output=True, text=True, check=True
            ).stdout
        )
        for name in OVERLAYS
    }


@needs_kubectl
def test_the_overlays_fit_the_schemas_and_name_real_images(built: dict[str, list[dict[str, Any]]]) -> None:
    for name, found in built.items():
        images = set()
        for resource in found:
            check(resource)
            assert resource["kind"] == "Namespace" or resource["metadata"].get("namespace") == "tla", (name, resource)
            images |= {part["image"] for pod in pods(resource) for part in pod["spec"]["containers"]}
        assert all(re.search(r":v?\d[\w.-]*(@sha256:\w{64})?$", image) for image in images), (name, images)


@needs_kubectl
def test_on_kind_nothing_asks_for_a_gpu(built: dict[str, list[dict[str, Any]]]) -> None:
    on_kind = {name: yaml.safe_dump_all(found) for name, found in built.items() if name.startswith("kind")}
    assert not [name for name, text in on_kind.items() if "nvidia.com/gpu" in text]
    assert "nvidia.com/gpu" in yaml.safe_dump_all(built["gpu-cloud/train"])


@needs_kubectl
def test_what_pods_read_from_is_there(built: dict[str, list[dict[str, Any]]]) -> None:
    secrets = re.search(r"<<SECRET\n(.*?)\nSECRET", (KUBERNETES / "create_secrets.sh").read_text(), flags=re.DOTALL)
    assert secrets
    keys = set(yaml.safe_load(secrets[1].replace("$(word)", "x"))["stringData"])
    for name, found in built.items():
        maps = {r["metadata"]["name"] for r in found if r["kind"] == "ConfigMap"}
        text = yaml.safe_dump_all(found)
        assert set(re.findall(r"configMapRef:\n\s+name: (\S+)", text)) <= maps, name
        assert set(re.findall(r"key: (\S+)\n\s+name: tla-secrets", text)) <= keys, name


CLUSTER_SPECS = [
    found
    for _, resource in WRITTEN
    for spec in [resource.get("spec", {})]
    for found in (spec, spec.get("rayClusterSpec", {}), spec.get("rayClusterConfig", {}))
]
AUTOSCALING = [spec["headGroupSpec"]["template"] for spec in CLUSTER_SPECS if spec.get("enableInTreeAutoscaling")]
PODS = [(name, pod) for name, resource in WRITTEN for pod in pods(resource)]


@pytest.mark.parametrize(("name", "pod"), PODS, ids=[name for name, _ in PODS])
def test_every_pod_is_restricted_and_has_limits(name: str, pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    # KubeRay lets the head of a cluster that scales itself change pods; code in other pods must not have its token.
    is_autoscaling = any(pod is head for head in AUTOSCALING)
    assert spec.get("automountServiceAccountToken", True) is is_autoscaling
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert "/tmp" in writable or container["image"].startswith("postgres")
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


CLUSTERS = [
    (name, spec)
    for name, resource in WRITTEN
    if resource["apiVersion"] == "ray.io/v1"
    for spec in [resource["spec"].get("rayClusterSpec") or resource["spec"].get("rayClusterConfig") or resource["spec"]]
]


@pytest.mark.parametrize(("name", "spec"), CLUSTERS, ids=[name for name, _ in CLUSTERS])
def test_every_ray_cluster_is_closed_and_survives_its_nodes(name: str, spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in yaml.safe_dump(spec["headGroupSpec"])
    if spec.get("enableInTreeAutoscaling"):
        assert spec["autoscalerOptions"]["securityContext"]["readOnlyRootFilesystem"] is True
        assert spec["autoscalerOptions"]["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    settings = (KUBERNETES / "overlays" / "gpu-cloud" / "settings" / "kustomization.yaml").read_text()
    drain = int(re.findall(r"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=(\d+)", settings)[0])
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > drain
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


def test_jobs_go_on_after_a_new_cluster() -> None:
    jobs = [resource for _, resource in WRITTEN if resource["kind"] == "RayJob"]
    assert len(jobs) == 2
    for job in jobs:
        assert job["spec"]["backoffLimit"] > 0
        assert job["spec"]["shutdownAfterJobFinishes"] is True
        is_sweep = "tune_tla" in job["spec"]["entrypoint"]
        assert ("--resume" in job["spec"]["entrypoint"]) == is_sweep
        # Kueue admits whole clusters: one that scales itself has no queue.
        assert ("kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {})) != is_sweep
        assert job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False) == is_sweep


def test_jobs_read_the_settings_of_their_entrypoints() -> None:
    commands = [resource["spec"]["entrypoint"] for _, resource in WRITTEN if resource["kind"] == "RayJob"]
    for path in KUBERNETES.rglob("kustomization.yaml"):
        for patch in yaml.safe_load(path.read_text()).get("patches", ()):
            changes = yaml.safe_load(patch["patch"])
            if isinstance(changes, list):
                commands += [change["value"] for change in changes if change["path"] == "/spec/entrypoint"]
    assert len(commands) == 4
    for command in commands:
        python, job, *flags = shlex.split(command)
        assert (python, (ROOT / job).is_file()) == ("python", True)
        is_sweep = job == "jobs/tune_tla.py"
        settings = read_settings(TuneSettings if is_sweep else RunSettings, [*flags, "--data.root", "/data"])
        if isinstance(settings, TuneSettings):
            Space(settings.run_config, settings.sweep)


def test_the_model_is_served_with_settings_that_serving_knows(built: dict[str, list[dict[str, Any]]]) -> None:
    settings = pytest.importorskip("tla_service.serving.settings")
    for overlay in ("gpu-cloud", "kind"):
        (service,) = [found for found in built[f"{overlay}/serve"] if found["kind"] == "RayService"]
        (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
        module, _, _ = application["import_path"].partition(":")
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        assert settings.ServeSettings.model_validate(application["args"]).gpus_per_replica == (overlay == "gpu-cloud")


def test_everything_not_named_is_refused_by_the_network() -> None:
    policies = [resource for _, resource in WRITTEN if resource["kind"] == "NetworkPolicy"]
    deny = next(policy for policy in policies if policy["metadata"]["name"] == "deny-all")
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert all(rule.get("from") for policy in policies for rule in policy["spec"].get("ingress", []))
