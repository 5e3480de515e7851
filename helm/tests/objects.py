"""Checks the objects that Helm rendered: objects.py DIRECTORY of HELM-VALUES-KUBERNETES.yaml.

Both Helms render the same objects. Each object passes the strict schemas, where unknown fields are errors. Names that refer
to other objects of the release find them. The shipped security context is the one in docs/chart.md.
"""

import pathlib
import sys

import kubernetes_validate
import yaml

VERSIONS = [f"1.{minor}" for minor in range(25, 38)]
# As in scripts/chart. The schemas begin at 1.25.
MADE_FOR = ["1.20", "1.25", "1.30", "1.37"]
# Kubernetes has no schemas for these groups.
FOREIGN = {"cert-manager.io", "monitoring.coreos.com", "gateway.networking.k8s.io", "gannet.dev"}
problems = []
checked = 0


def number(version):
    return tuple(map(int, version.split(".")))


def load(path):
    return [o for o in yaml.safe_load_all(path.read_text()) if o]


def without_secrets(objects):
    """Returns the objects without keys and certificates, which differ each time."""
    return [{**o, "data": sorted(o["data"]), "metadata": {**o["metadata"], "annotations": None}} if o["kind"] == "Secret" else o for o in objects]


def key(o):
    return (o["kind"], o["metadata"]["name"])


def strings(node, name):
    """Yields all values of fields of this name."""
    if isinstance(node, dict):
        for k, v in node.items():
            if k == name and isinstance(v, str):
                yield v
            yield from strings(v, name)
    elif isinstance(node, list):
        for v in node:
            yield from strings(v, name)


def references(where, objects):
    have = {key(o) for o in objects}
    certificates = {s for o in objects if o["kind"] == "Certificate" for s in strings(o["spec"], "secretName")}
    for o in objects:
        pod = o.get("spec", {}).get("template", {}).get("spec") or (o["spec"] if o["kind"] == "Pod" else None)
        if not pod:
            continue
        # A Service gannet-collector would inject GANNET_COLLECTOR_PORT.
        if pod.get("enableServiceLinks") is not False:
            problems.append(f"{where}: {key(o)} takes environment variables of Services")
        for container in pod.get("initContainers", []) + pod["containers"]:
            volumes = {v["name"] for v in pod.get("volumes", [])} | {c["metadata"]["name"] for c in o["spec"].get("volumeClaimTemplates", [])}
            missing = {m["name"] for m in container.get("volumeMounts", [])} - volumes
            if missing:
                problems.append(f"{where}: {key(o)} mounts {missing}, which are no volumes")
            ports = {p["name"] for p in container.get("ports", [])}
            for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
                port = container.get(probe, {}).get("httpGet", {}).get("port")
                if port is not None and port not in ports:
                    problems.append(f"{where}: {probe} of {key(o)} asks port {port}")
        for volume in pod.get("volumes", []):
            host = volume.get("hostPath")
            # Paths of the host may be links, or missing: `Directory` follows links, and stops the pod where the path is missing.
            if host and not (
                host.get("type") == "Directory" and host["path"] == "/sys/fs/cgroup"
                or host.get("type") == "DirectoryOrCreate" and host["path"].startswith("/var/") and ".." not in host["path"]
            ):
                problems.append(f"{where}: {key(o)} mounts {host}: only directories, and none created outside of /var")
            if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in have:
                problems.append(f"{where}: {key(o)} mounts the ConfigMap {volume['configMap']['name']}, which does not exist")
            secret = volume.get("secret", {}).get("secretName")
            if secret and not brings_secrets(where) and ("Secret", secret) not in have and secret not in certificates | OWN_SECRETS:
                problems.append(f"{where}: {key(o)} mounts the Secret {secret}, which does not exist")
        selector = o["spec"].get("selector", {}).get("matchLabels")
        if selector:
            labels = o["spec"]["template"]["metadata"]["labels"]
            if not selector.items() <= labels.items():
                problems.append(f"{where}: the selector of {key(o)} does not find its pods")
    if len(have) != len(objects):
        problems.append(f"{where}: two objects have the same name")
    # A Service that selects no pods serves no one.
    pods = [o["spec"]["template"]["metadata"]["labels"] for o in objects if o["kind"] in ("DaemonSet", "StatefulSet")]
    for o in objects:
        wanted = {"Service": lambda s: s["selector"], "NetworkPolicy": lambda s: s["podSelector"]["matchLabels"], "PodDisruptionBudget": lambda s: s["selector"]["matchLabels"], "PodMonitor": lambda s: s["selector"]["matchLabels"]}.get(o["kind"])
        if wanted and not any(wanted(o["spec"]).items() <= labels.items() for labels in pods):
            problems.append(f"{where}: {key(o)} finds no pods")


# Secrets that users make, as values/*.yaml name them.
OWN_SECRETS = {"clickhouse"}


def brings_secrets(where):
    """Whether the values have tls.mode: existingSecrets."""
    return any(name in where for name in ("agents-only", "collector-only"))


def restricted(where, objects):
    """Checks what docs/chart.md promises of the shipped values."""
    agent = next(o for o in objects if o["kind"] == "DaemonSet")["spec"]["template"]["spec"]
    context = agent["containers"][0]["securityContext"]
    want = {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH", "CHECKPOINT_RESTORE", "SYSLOG"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for name, value in want.items():
        if context.get(name) != value:
            problems.append(f"{where}: the agent's securityContext.{name} is {context.get(name)}, not {value}")
    if agent.get("hostNetwork") or any("hostPort" in p for c in agent["containers"] for p in c["ports"]):
        problems.append(f"{where}: the agent is on the node's network")
    paths = sorted(v["hostPath"]["path"] for v in agent["volumes"] if "hostPath" in v)
    if paths != ["/sys/fs/cgroup", "/var/lib/gannet", "/var/lib/kubelet/pods-api"]:
        problems.append(f"{where}: the agent mounts {paths} of the node")
    collector = next(o for o in objects if o["kind"] == "StatefulSet")["spec"]["template"]["spec"]
    if not collector["securityContext"]["runAsNonRoot"]:
        problems.append(f"{where}: the collector is root")
    # From 1.30 on the collector checks the node of an agent by its token.
    if ("--node-identity=token" in collector["containers"][0]["args"]) != (number(where.rsplit("-", 1)[1]) >= (1, 30)):
        problems.append(f"{where}: the collector checks tokens in the wrong versions")


def agent_options(objects):
    """Options of the agent by their keys in its configuration file; none without an agent."""
    files = [o["data"]["agent.yaml"] for o in objects if o["kind"] == "ConfigMap" and "agent.yaml" in o.get("data", {})]
    return yaml.safe_load(files[0]) if files else {}


directory = pathlib.Path(sys.argv[1])
sets = sorted({p.stem.removeprefix("helm-") for p in directory.glob("helm-*.yaml")})
for name in sets:
    objects, by_four = load(directory / f"helm-{name}.yaml"), load(directory / f"helm4-{name}.yaml")
    if sorted(map(str, without_secrets(objects))) != sorted(map(str, without_secrets(by_four))):
        problems.append(f"{name}: Helm 3 and 4 render different objects")
    references(name, objects)
    values, kubernetes = name.rsplit("-", 1)
    if number(kubernetes) < (1, 25) and "x-kubernetes-validations" in str(objects):
        problems.append(f"{name}: a field that Kubernetes {kubernetes} lacks")
    if values == "default":
        restricted(name, objects)
    if values == "everything":
        agent = next(o for o in objects if o["kind"] == "DaemonSet")["spec"]["template"]["spec"]
        if "SYS_ADMIN" not in agent["containers"][0]["securityContext"]["capabilities"]["add"]:
            problems.append(f"{name}: agent.sysAdmin does not add SYS_ADMIN")
        uploads = agent_options(objects)
        if [uploads.get(f"debuginfo_upload{key}") for key in ("", "_rate", "_file_bytes")] != [True, "1MiB", "64MiB"]:
            problems.append(f"{name}: agent.debugInfoUpload does not reach the agent")
    elif agent_options(objects).get("debuginfo_upload"):
        problems.append(f"{name}: agents upload debug information without agent.debugInfoUpload")
    # Objects for a version must hold until the next version for which the chart was rendered.
    for version in VERSIONS:
        if max((k for k in MADE_FOR if number(k) <= number(version)), key=number) != kubernetes:
            continue
        for o in objects:
            if o["apiVersion"].split("/")[0] in FOREIGN:
                continue
            try:
                kubernetes_validate.validate(o, version, strict=True)
                checked += 1
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                problems.append(f"{name}: {key(o)} for Kubernetes {version}: {error}")

for problem in problems:
    print("FAILED:", problem)
print(f"{checked} objects checked against the schemas of Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}")
sys.exit(bool(problems) or checked == 0)
