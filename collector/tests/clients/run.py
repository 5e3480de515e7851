"""Checks the collector with the clients of other projects: run.py COLLECTOR PROTOS NODE_MODULES GO_PROGRAM

Programs with Pyroscope's own clients for Python and Node push profiles, and one in Go pushes those of its runtime. A client made by Google's protobuf from the .proto files, which shares no
code with the collector, then reads them as Grafana does, in protobuf and in JSON. The last line is "N passed, N failed".
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_tools import protoc

HERE = os.path.dirname(os.path.abspath(__file__))


class Messages:
    """The messages of the services, from their .proto files."""

    def __init__(self, protos, work):
        out = os.path.join(work, "descriptors.bin")
        files = ["querier/v1/querier.proto", "push/v1/push.proto"]
        arguments = ["protoc", "-I" + protos, "--include_imports", "--descriptor_set_out=" + out, *files]
        assert protoc.main(arguments) == 0, "protoc failed"
        self.pool = descriptor_pool.DescriptorPool()
        with open(out, "rb") as file:
            for described in descriptor_pb2.FileDescriptorSet.FromString(file.read()).file:
                self.pool.Add(described)
        self.service = self.pool.FindServiceByName("querier.v1.QuerierService")

    def of(self, descriptor):
        return message_factory.GetMessageClass(descriptor)


class Client:
    """Calls the query service in both encodings, and checks that both answers are equal."""

    def __init__(self, url, messages):
        self.url = url
        self.messages = messages

    def post(self, path, kind, body, more=None):
        headers = {"content-type": kind, "accept-encoding": "gzip", **(more or {})}
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.headers["content-type"] == kind, answer.headers["content-type"]
            body = answer.read()
            return gzip.decompress(body) if answer.headers["content-encoding"] == "gzip" else body

    def call(self, method, **fields):
        described = self.messages.service.FindMethodByName(method)
        request = self.messages.of(described.input_type)(**fields)
        answer = self.messages.of(described.output_type)
        path = f"/querier.v1.QuerierService/{method}"
        binary = answer.FromString(
            self.post(path, "application/proto", request.SerializeToString(), {"connect-protocol-version": "1"})
        )
        # Its reader refuses unknown fields and wrong types.
        text = json_format.MessageToJson(request).encode()
        parsed = json_format.Parse(self.post(path, "application/json", text), answer())
        assert binary == parsed, f"{method}: protobuf and JSON differ"
        return binary

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)


def functions(graph):
    """Returns the share of all values below each function of a flame graph."""
    total = {}
    for level in graph.levels[1:]:
        for index in range(0, len(level.values), 4):
            name = graph.names[level.values[index + 3]]
            total[name] = max(total.get(name, 0), level.values[index + 1])
    return {name: value / max(graph.total, 1) for name, value in total.items()}


class Checks:
    """The checks. Each method that begins with `check_` is one."""

    def __init__(self, client, started_ms):
        self.client = client
        self.range = {"start": started_ms, "end": int(time.time() * 1000) + 1000}

    def graph(self, kind, service, **more):
        answer = self.client.call(
            "SelectMergeStacktraces",
            profile_typeID=kind,
            label_selector=f'{{service_name="{service}"}}',
            **self.range,
            **more,
        )
        return answer.flamegraph

    def check_profile_types(self):
        ids = {kind.ID for kind in self.client.call("ProfileTypes", **self.range).profile_types}
        wanted = {
            "process_cpu:cpu:nanoseconds:cpu:nanoseconds",
            "wall:wall:nanoseconds:wall:nanoseconds",
            "process_cpu:cpu:nanoseconds:wall:nanoseconds",
            "memory:inuse_space:bytes:space:bytes",
            "memory:alloc_space:bytes:space:bytes",
            "mutex:contentions:count:contentions:count",
            "block:delay:nanoseconds:contentions:count",
            "goroutine:goroutine:count:goroutine:count",
        }
        assert wanted <= ids, f"missing {wanted - ids} of {ids}"

    def check_services_and_labels(self):
        sets = self.client.call("Series", label_names=["service_name", "__profile_type__"], **self.range).labels_set
        services = {label.value for labels in sets for label in labels.labels if label.name == "service_name"}
        assert {"shop.python", "shop.node", "shop.go"} <= services, services
        matchers = ['{__profile_type__="process_cpu:cpu:nanoseconds:cpu:nanoseconds", service_name="shop.python"}']
        names = self.client.call("LabelNames", matchers=matchers, **self.range).names
        assert {"region", "version", "service_name", "__name__"} <= set(names), names
        values = self.client.call("LabelValues", name="region", matchers=matchers, **self.range).names
        assert list(values) == ["eu"], values
        stats = self.client.call("GetProfileStats")
        assert stats.data_ingested and self.range["start"] - 60_000 < stats.newest_profile_time, stats

    def check_flame_graph_of_python(self):
        shares = functions(self.graph("process_cpu:cpu:nanoseconds:cpu:nanoseconds", "shop.python"))
        assert shares.get("hot_python", 0) > 0.8, shares

    def check_flame_graph_of_node(self):
        shares = functions(self.graph("process_cpu:cpu:nanoseconds:wall:nanoseconds", "shop.node", max_nodes=16384))
        # The rest is the collection of garbage, and Node itself.
        share = {name.split(":")[-2]: share for name, share in shares.items() if "shop.js" in name}
        assert share.get("turn", 0) > 0.4 and share.get("hotNode", 0) > 0.1, shares
        assert self.graph("memory:inuse_space:bytes:space:bytes", "shop.node").total > 0

    def check_flame_graph_of_go(self):
        shares = functions(self.graph("process_cpu:cpu:nanoseconds:cpu:nanoseconds", "shop.go"))
        assert shares.get("main.hotGo", 0) > 0.5, shares

    def check_series_pprof_and_graph_agree(self):
        kind = "process_cpu:cpu:nanoseconds:cpu:nanoseconds"
        selector = '{service_name="shop.python"}'
        series = self.client.call(
            "SelectSeries", profile_typeID=kind, label_selector=selector, step=1, group_by=["region"], **self.range
        ).series
        assert [(label.name, label.value) for label in series[0].labels] == [("region", "eu")], series
        total = self.graph(kind, "shop.python").total
        pprof = self.client.call(
            "SelectMergeProfile", profile_typeID=kind, label_selector=selector, **self.range
        )
        assert sum(sample.value[0] for sample in pprof.sample) == total
        assert sum(point.value for point in series[0].points) == total
        own = self.client.get("/api/v1/flamegraph?query=%7Bservice_name%3D%22shop.python%22%7D&type=cpu/nanoseconds")
        assert own["total"] == total, (own["total"], total)

    def check_diff(self):
        kind = "process_cpu:cpu:nanoseconds:cpu:nanoseconds"
        side = {"profile_typeID": kind, "label_selector": '{service_name="shop.python"}', **self.range}
        graph = self.client.call("Diff", left=side, right=side).flamegraph
        assert graph.leftTicks == graph.rightTicks > 0 and graph.total == 2 * graph.leftTicks, graph

    def check_errors_have_connects_form(self):
        try:
            self.client.call("SelectSeries", profile_typeID="x", start=1, end=2, step=1)
        except urllib.error.HTTPError as error:
            body = json.load(error)
            assert (error.code, body["code"]) == (400, "invalid_argument"), body
            return
        raise AssertionError("a wrong profile type got an answer")


def start_collector(program, work):
    """Starts a collector. Returns its process and the address of its HTTP listener."""
    import socket

    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    http = f"127.0.0.1:{ports[0]}"
    arguments = ["--data", os.path.join(work, "data"), "--http-listen", http, "--grpc-listen", f"127.0.0.1:{ports[1]}"]
    process = subprocess.Popen([program, *arguments])
    url = "http://" + http
    for _ in range(300):
        try:
            urllib.request.urlopen(url + "/readyz", timeout=5).close()
            return process, url
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise RuntimeError("the collector did not start")


def main():
    collector, protos, modules, go = sys.argv[1:]
    passed = failed = 0
    with tempfile.TemporaryDirectory() as work:
        messages = Messages(protos, work)
        started = int(time.time() * 1000) - 1000
        process, url = start_collector(collector, work)
        try:
            node = {**os.environ, "NODE_PATH": modules}
            programs = [
                subprocess.Popen([sys.executable, os.path.join(HERE, "shop.py"), url]),
                subprocess.Popen(["node", os.path.join(HERE, "shop.js"), url], env=node),
                subprocess.Popen([go, url]),
            ]
            for program in programs:
                assert program.wait(timeout=120) == 0, program.args
            checks = Checks(Client(url, messages), started)
            for name in sorted(name for name in dir(checks) if name.startswith("check_")):
                try:
                    getattr(checks, name)()
                    passed += 1
                    print("ok    ", name)
                except Exception:
                    failed += 1
                    print("FAILED", name)
                    traceback.print_exc()
        finally:
            process.terminate()
            process.wait(timeout=30)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


sys.exit(main())
