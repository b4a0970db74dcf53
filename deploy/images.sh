#!/bin/sh
# Builds the images with docker, podman or whatever ENGINE names. REGISTRY is put before their names, TAG after;
# TARGETS chooses, PUSH=1 pushes, BUILD_ARGS is passed on (for instance "--build-arg TORCH_INDEX=...").
set -eu
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
tag=${TAG:-$version}
prefix=${REGISTRY:-twostroke}
engine=${ENGINE:-}
if [ -z "$engine" ]; then
    for candidate in docker podman; do
        if command -v "$candidate" >/dev/null 2>&1; then engine=$candidate; break; fi
    done
fi
if [ -z "$engine" ]; then
    echo "images: neither docker nor podman found on PATH; name another engine with ENGINE=..." >&2
    exit 1
fi

for target in ${TARGETS:-router worker-cpu worker-gpu}; do
    image="$prefix/$target:$tag"
    echo "images: $image"
    # shellcheck disable=SC2086 # BUILD_ARGS is a list of words
    DOCKER_BUILDKIT=1 "$engine" build --file deploy/Dockerfile --target "$target" --tag "$image" ${BUILD_ARGS:-} .
    if [ "${PUSH:-}" = 1 ]; then "$engine" push "$image"; fi
done
