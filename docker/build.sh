#!/bin/sh
# Builds the image $1 (cpu or gpu) with docker, podman or buildah: the first that works here, or ENGINE.
#
#   TORCH_INDEX=<PyTorch's CPU wheel index> docker/build.sh cpu
#
# TAG is its name (repvgg-deploy:cpu). The Dockerfile's other build arguments are taken from the environment, those named
# below; OPTIONS holds more words for the engine's build command, such as "--no-cache".
set -eu
cd "$(dirname "$0")/.."
target=${1:-cpu}
case $target in cpu | gpu) ;; *)
    echo "usage: docker/build.sh cpu|gpu" >&2
    exit 2
    ;;
esac

# docker without its daemon is no use, and so is podman without what it runs containers with.
works() {
    case $1 in
    buildah) buildah --version ;;
    *) "$1" info ;;
    esac >/dev/null 2>&1
}
for engine in ${ENGINE:-docker podman buildah}; do
    if works "$engine"; then found=$engine && break; fi
    if command -v "$engine" >/dev/null 2>&1; then
        tried="${tried:+$tried, }$engine is installed but does not answer"
    else
        tried="${tried:+$tried, }$engine is not installed"
    fi
done
[ "${found:-}" ] || {
    echo "error: there is nothing to build an image with: $tried" >&2
    echo "hint: install docker, podman or buildah, and start docker's daemon" >&2
    exit 1
}

case $found in
docker) set -- docker build ;;
# Without it they leave the HEALTHCHECK out.
podman) set -- podman build --format docker ;;
buildah) set -- buildah bud --format docker ;;
esac
for name in CPU_BASE GPU_BASE TORCH TORCH_INDEX EXTRAS PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS; do
    eval "value=\${$name:-}"
    [ -z "$value" ] || set -- "$@" --build-arg "$name=$value"
done
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
created=$(git log -1 --format=%cI 2>/dev/null || date -u +%Y-%m-%dT%H:%M:%SZ)
# shellcheck disable=SC2086
"$@" ${OPTIONS:-} --target "$target" --tag "${TAG:-repvgg-deploy:$target}" \
    --build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' repvgg_deploy/__init__.py)" \
    --build-arg "REVISION=$revision" --build-arg "CREATED=$created" .
