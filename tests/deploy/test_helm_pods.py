"""Values of images, models, pools and devices, one a line: what it says, values, how it is seen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.helm_values import DEFAULT, HUB, PODS, Seen, hub, pool, rendered

TABLE: list[tuple[str, dict[str, Any], Seen]] = [
    # ---- images
    (
        "an image has the chart's version as its tag",
        DEFAULT,
        lambda r: r.container("router")["image"] == "registry.test/router:0.1.0",
    ),
    (
        "a digest wins over a tag",
        {"images": {"router": {"tag": "x", "digest": f"sha256:{'0' * 64}"}}},
        lambda r: r.container("router")["image"] == f"registry.test/router@sha256:{'0' * 64}",
    ),
    (
        "a pool on CPUs has the image for them",
        pool(device="cpu"),
        lambda r: r.container("decode")["image"] == "registry.test/workerCpu:0.1.0",
    ),
    (
        "a pool may have another tag of the shared image",
        pool(image={"tag": 2}),
        lambda r: r.container("prefill")["image"] == "registry.test/workerGpu:2",
    ),
    (
        "a pool may have an image of its own",
        {"pools": {"decode": {"role": "decode", "image": {"repository": "mine.test/worker", "tag": "t"}}}},
        lambda r: (
            (r.container("decode")["image"], r.container("prefill")["image"])
            == ("mine.test/worker:t", "registry.test/workerGpu:0.1.0")
        ),
    ),
    (
        "pull secrets reach every pod",
        {"images": {"pullSecrets": ["regcred"]}},
        lambda r: all(r.pod(name)["imagePullSecrets"] == [{"name": "regcred"}] for name in PODS),
    ),
    # ---- the model
    (
        "a model on a claim is mounted read-only and nothing is fetched",
        DEFAULT,
        lambda r: (
            all(
                r.mounts(name)["/models"]["readOnly"]
                and r.volumes(name)["models"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
                and "fetch-model" not in r.init(name)
                for name in ("router", "prefill", "decode")
            )
            and not r.of("PersistentVolumeClaim")
        ),
    ),
    (
        "a model is named as its folder is",
        DEFAULT,
        lambda r: (
            {r.flags(name)["model-name"] for name in ("router", "prefill", "decode")} == {"tiny"}
            and r.flags("decode")["model-dir"] == "/models/org/tiny"
        ),
    ),
    (
        "a model of the hub is named by its repository, or as it is told",
        hub(),
        lambda r: (
            r.flags("router")["model-name"] == "org/tiny"
            and rendered(hub(name="mine")).flags("router")["model-name"] == "mine"
        ),
    ),
    (
        "a model of the hub is fetched by an init container to where the service reads it",
        hub(),
        lambda r: all(
            f"--dir={r.flags(name)['model-dir']}" in r.init(name)["fetch-model"]["args"]
            and r.init(name)["fetch-model"]["command"] == ["python", "-m", "twostroke_cli.fetch"]
            and not r.init(name)["fetch-model"]["volumeMounts"][0].get("readOnly")
            and r.mounts(name)["/models"]["readOnly"]
            for name in ("router", "prefill", "decode")
        ),
    ),
    (
        "fetched models lie on one volume that stays when the release goes",
        hub(cache={"size": "5Gi", "storageClassName": "nfs"}),
        lambda r: (
            {r.volumes(n)["models"]["persistentVolumeClaim"]["claimName"] for n in ("router", "decode")}
            == {"r-twostroke-models"}
            and r.of("PersistentVolumeClaim")["models"]["metadata"]["annotations"]
            == {"helm.sh/resource-policy": "keep"}
            and r.spec("PersistentVolumeClaim", "models")
            == {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "nfs",
                "resources": {"requests": {"storage": "5Gi"}},
            }
        ),
    ),
    (
        "an existing claim is taken instead",
        hub(cache={"claimName": "shared"}),
        lambda r: (
            not r.of("PersistentVolumeClaim")
            and r.volumes("prefill")["models"]["persistentVolumeClaim"]["claimName"] == "shared"
        ),
    ),
    (
        "without a volume each pod fetches for itself, the router no weights",
        hub(cache={"enabled": False, "podSizeLimit": "7Gi"}),
        lambda r: (
            not r.of("PersistentVolumeClaim")
            and r.volumes("decode")["models"]["emptyDir"] == {"sizeLimit": "7Gi"}
            and "--without-weights" in r.init("router")["fetch-model"]["args"]
            and "--without-weights" not in r.init("decode")["fetch-model"]["args"]
            and r.flags("router")["model-dir"] != r.flags("decode")["model-dir"]
        ),
    ),
    (
        "the hub's token comes from a secret",
        hub(hf={**HUB, "tokenSecret": {"name": "hf", "key": "k"}}),
        lambda r: (
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "k"}}}
            in r.init("decode")["fetch-model"]["env"]
        ),
    ),
    (
        "the hub may have a mirror",
        hub(hf={**HUB, "endpoint": "http://mirror.test:8080"}),
        lambda r: (
            {"name": "HF_ENDPOINT", "value": "http://mirror.test:8080"} in r.init("router")["fetch-model"]["env"]
            and (None, [8080]) in r.opened("router", "egress")
        ),
    ),
    (
        "offline nothing is fetched and no way out is open for it",
        hub(hf={**HUB, "offline": True}, cache={"claimName": "shared"}),
        lambda r: (
            {"name": "HF_HUB_OFFLINE", "value": "1"} in r.init("decode")["fetch-model"]["env"]
            and (None, [443]) not in r.opened("workers", "egress")
            and (None, [443]) in rendered(hub()).opened("workers", "egress")
        ),
    ),
    # ---- pools
    (
        "there is a prefill and a decode pool",
        DEFAULT,
        lambda r: (
            [r.container(n)["command"][-1] for n in ("prefill", "decode")] == ["twostroke_prefill", "twostroke_decode"]
        ),
    ),
    (
        "a decode pool alone is the colocated form",
        {"pools": {"prefill": {"role": "prefill", "enabled": False}}},
        lambda r: set(r.of("Deployment")) == {"router", "decode"},
    ),
    (
        "null takes a pool away too",
        {"pools": {"prefill": None}},
        lambda r: set(r.of("Deployment")) == {"router", "decode"},
    ),
    (
        "there may be more pools, each over the defaults",
        {"poolDefaults": {"replicas": 3}, "pools": {"decode-long": {"role": "decode", "settings": {"max-running": 8}}}},
        lambda r: (
            r.workload("decode-long")["replicas"] == r.workload("decode")["replicas"] == 3
            and r.flags("decode-long")["max-running"] == "8"
            and "max-running" not in r.flags("decode")
        ),
    ),
    (
        "pools are told apart by their selectors",
        DEFAULT,
        lambda r: (
            [r.workload(n)["selector"]["matchLabels"]["twostroke/pool"] for n in ("prefill", "decode")]
            == ["prefill", "decode"]
        ),
    ),
    (
        "pods carry no version: a new chart alone restarts no worker",
        DEFAULT,
        lambda r: all(
            set(r.workload(name)["template"]["metadata"]["labels"])
            <= {
                *("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"),
                *("twostroke/pool", "twostroke/role"),
            }
            for name in PODS
        ),
    ),
    (
        "a flag is an argument, large numbers and switches included",
        pool(settings={"kv-cache-bytes": 17179869184, "batch-invariant": True, "gpu-memory-fraction": 0.85}),
        lambda r: (
            (r.flags("decode")["kv-cache-bytes"], r.flags("decode")["gpu-memory-fraction"]) == ("17179869184", "0.85")
            and r.flags("decode")["batch-invariant"] == ""
        ),
    ),
    (
        "a switch that is off is said",
        pool(settings={"batch-invariant": False}),
        lambda r: "no-batch-invariant" in r.flags("decode"),
    ),
    (
        "settings of all services are overridden by a service's own",
        {"settings": {"log-level": "debug"}, "router": {"settings": {"log-level": "error"}}},
        lambda r: (r.flags("router")["log-level"], r.flags("decode")["log-level"]) == ("error", "debug"),
    ),
    (
        "environment of a pool is added",
        pool(env=[{"name": "NCCL_DEBUG", "value": "INFO"}]),
        lambda r: r.env("decode")["NCCL_DEBUG"] == "INFO",
    ),
    # ---- devices
    (
        "a GPU is asked for by its resource",
        pool(gpus={"resource": "nvidia.com/mig-3g.40gb", "count": 1}),
        lambda r: (
            r.container("decode")["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == 1
            and r.container("decode")["resources"]["requests"]["nvidia.com/mig-3g.40gb"] == 1
            and r.container("decode")["resources"]["limits"]["memory"] == "64Gi"
        ),
    ),
    (
        "a pool on CPUs asks for no GPU and keeps no kernels",
        pool(device="cpu"),
        lambda r: (
            set(r.container("decode")["resources"]["limits"]) == {"memory"}
            and "kernels" not in r.volumes("decode")
            and not r.init("decode")
            and r.flags("decode")["device"] == "cpu"
        ),
    ),
    (
        "RDMA is asked for by its resource, with the right to pin memory",
        pool(rdma={"resource": "rdma/ib", "count": 2}),
        lambda r: (
            r.container("decode")["resources"]["limits"]["rdma/ib"] == 2
            and r.container("decode")["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
            and all(c["securityContext"]["capabilities"] == {"drop": ["ALL"]} for c in r.init("decode").values())
        ),
    ),
    (
        "pinning can be left out",
        pool(rdma={"resource": "rdma/ib", "ipcLock": False}),
        lambda r: r.container("decode")["securityContext"]["capabilities"] == {"drop": ["ALL"]},
    ),
    (
        "/dev/shm has the size that was asked for",
        pool(sharedMemory="9Gi"),
        lambda r: (
            r.volumes("decode")["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "9Gi"}
            and "/dev/shm" in r.mounts("decode")
        ),
    ),
    ("/dev/shm can stay the runtime's", pool(sharedMemory=""), lambda r: "/dev/shm" not in r.mounts("decode")),
    (
        "pods do not share IPC, process ids or network by default",
        DEFAULT,
        lambda r: all(not {"hostIPC", "hostPID", "hostNetwork"} & set(r.pod(name)) for name in PODS),
    ),
    (
        "CUDA IPC across pods shares the node's network, IPC objects and process ids",
        pool(cudaIpcAcrossPods=True),
        lambda r: (
            all(r.pod("decode")[what] for what in ("hostNetwork", "hostIPC", "hostPID"))
            and not {"hostNetwork", "hostIPC", "hostPID"} & set(r.pod("router"))
        ),
    ),
    (
        "a pool on the host's network still finds names of the cluster",
        pool(hostNetwork=True),
        lambda r: r.pod("decode")["hostNetwork"] and r.pod("decode")["dnsPolicy"] == "ClusterFirstWithHostNet",
    ),
    (
        "pools on one node's network have ports of their own",
        {"pools": {"decode": {"role": "decode", "ports": {"grpc": 9010, "metrics": 9011}}}},
        lambda r: (
            (r.flags("decode")["listen"], r.flags("decode")["metrics"]) == ("0.0.0.0:9010", "0.0.0.0:9011")
            and [port["containerPort"] for port in r.container("decode")["ports"]] == [9010, 9011]
            and r.container("decode")["readinessProbe"]["grpc"] == {"port": 9010}
            and r.flags("prefill")["listen"] == "0.0.0.0:9000"
            and (["router"], [9010, 9000]) in r.opened("workers", "ingress")
            and (["worker"], [9010, 9000]) in r.opened("router", "egress")
        ),
    ),
    (
        "kernels of the image are copied to where more can be added",
        pool(kernelCache={"claimName": "kernels"}),
        lambda r: (
            r.init("decode")["copy-kernels"]["volumeMounts"][0]["mountPath"]
            == r.mounts("decode")["/var/cache/twostroke/triton"]["mountPath"]
            and r.volumes("decode")["kernels"] == {"name": "kernels", "persistentVolumeClaim": {"claimName": "kernels"}}
            and r.init("decode")["copy-kernels"]["image"] == r.container("decode")["image"]
        ),
    ),
    # ---- where pods run
    (
        "pods are placed as the pool says",
        pool(
            nodeSelector={"gpu": "h100"},
            tolerations=[{"key": "gpu", "operator": "Exists"}],
            affinity={"podAntiAffinity": {}},
            topologySpreadConstraints=[{"maxSkew": 2, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
            priorityClassName="high",
            runtimeClassName="nvidia",
        ),
        lambda r: (
            r.pod("decode")["nodeSelector"] == {"gpu": "h100"}
            and r.pod("decode")["tolerations"][0]["key"] == "gpu"
            and r.pod("decode")["affinity"] == {"podAntiAffinity": {}}
            and r.pod("decode")["topologySpreadConstraints"][0]["maxSkew"] == 2
            and r.pod("decode")["priorityClassName"] == "high"
            and r.pod("decode")["runtimeClassName"] == "nvidia"
            and "nodeSelector" not in r.pod("router")
        ),
    ),
    (
        "routers spread over nodes by themselves",
        DEFAULT,
        lambda r: r.pod("router")["topologySpreadConstraints"][0]["topologyKey"] == "kubernetes.io/hostname",
    ),
    (
        "a GPU that is not there holds no upgrade up, and routers never fall below their number",
        DEFAULT,
        lambda r: (
            r.workload("decode")["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
            and r.workload("router")["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        ),
    ),
]


@pytest.mark.parametrize(("says", "values", "seen"), TABLE, ids=[says for says, _, _ in TABLE])
def test_values(says: str, values: dict[str, Any], seen: Seen) -> None:
    assert seen(rendered(values)), says
