# Two targets; docker/build.sh (`make image`) builds either with docker, podman or buildah.
#   docker build --target cpu --build-arg TORCH_INDEX=<PyTorch's CPU wheel index> -t repvgg-deploy:cpu .
#   docker build --target gpu --build-arg GPU_BASE=nvcr.io/nvidia/tensorrt:25.10-py3 -t repvgg-deploy:gpu .
# CI pipelines run it as one command, on files mounted at /work:
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" repvgg-deploy:cpu export net.pth -o out

ARG GPU_BASE=nvcr.io/nvidia/tensorrt:25.10-py3
ARG CPU_BASE=python:3.12-slim

# What the stages that run pip have in common; both start from it, so that what a builder sets for all stages reaches them.
FROM ${CPU_BASE} AS pip
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# The wheel is built once, so that neither image holds sources or build tools.
FROM pip AS wheel
# pip's own settings, for those who build behind a mirror or from a folder of wheels.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY repvgg_deploy repvgg_deploy
COPY models models
COPY calibration calibration
COPY docs/schemas docs/schemas
RUN pip wheel --quiet --no-deps -w /wheels .

# The CPU image's packages, in an environment that is copied as a whole: nothing of pip's work stays behind.
FROM pip AS packages
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# Where PyTorch's CPU builds are to be had, if not where pip's own configuration looks. The default build of torch is never
# taken in their place, since that brings gigabytes of CUDA libraries.
ARG TORCH_INDEX=""
ARG TORCH=2.13.0
# Further extras, of those with a file in requirements/: "pull", "rtx", "serve", "rtx serve".
ARG EXTRAS=""
COPY requirements /requirements
COPY docker/install_packages.sh docker/make_sbom.sh /usr/local/bin/
COPY --from=wheel /wheels /wheels
RUN install_packages.sh /usr/local/lib/repvgg-deploy \
    && make_sbom.sh /usr/local/lib/repvgg-deploy/bin/python /usr/local/lib/repvgg-deploy/sbom.cdx.json

FROM ${CPU_BASE} AS cpu
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="repvgg-deploy" \
      org.opencontainers.image.description="RepVGG checkpoint in, verified ONNX graph and engine out: on the CPU" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
# Any user may run it (`--user`), one without a name or a home too: caches and settings have a place that all may write to,
# and USER is what Python takes for the name of a user that /etc/passwd does not know.
ENV PATH=/usr/local/lib/repvgg-deploy/bin:${PATH} \
    HOME=/var/lib/repvgg-deploy \
    USER=deploy \
    XDG_CACHE_HOME=/var/lib/repvgg-deploy/cache \
    XDG_CONFIG_HOME=/var/lib/repvgg-deploy/config \
    ORT_DISABLE_TELEMETRY=1
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/repvgg-deploy deploy \
    && install -d -m 1777 /work /var/lib/repvgg-deploy /var/lib/repvgg-deploy/cache /var/lib/repvgg-deploy/config
COPY --from=packages /usr/local/lib/repvgg-deploy /usr/local/lib/repvgg-deploy
# By number: Kubernetes' runAsNonRoot cannot look names up.
USER 10001:10001
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=60s --start-period=30s \
    CMD ["repvgg-deploy", "doctor", "--quiet", "--require", "onnxruntime", "--require", "torch"]
ENTRYPOINT ["repvgg-deploy"]
CMD ["--help"]

# The base brings CUDA and TensorRT 10 with its Python bindings (25.10: TensorRT 10.13, the oldest that is supported);
# torch brings its own CUDA. Engines and ONNX graphs need nothing of each other: ONNX Runtime runs on its CUDA provider.
FROM ${GPU_BASE} AS gpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="repvgg-deploy" \
      org.opencontainers.image.description="RepVGG checkpoint in, verified ONNX graph and TensorRT engine out" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
ENV HOME=/var/lib/repvgg-deploy \
    USER=deploy \
    XDG_CACHE_HOME=/var/lib/repvgg-deploy/cache \
    XDG_CONFIG_HOME=/var/lib/repvgg-deploy/config \
    ORT_DISABLE_TELEMETRY=1
COPY requirements /requirements
COPY docker/make_sbom.sh docker/gpu-entrypoint.sh /usr/local/bin/
COPY --from=wheel /wheels /wheels
# The base has pins of its own for what it brings; here those of this project hold, torch's among them.
RUN export PIP_CONSTRAINT="" PIP_BREAK_SYSTEM_PACKAGES=1 \
    && python3 -m pip install --quiet --no-cache-dir --root-user-action ignore --require-hashes -r /requirements/gpu.txt \
    && python3 -m pip install --quiet --no-cache-dir --root-user-action ignore --no-deps /wheels/*.whl \
    && install -d /usr/local/lib/repvgg-deploy && make_sbom.sh python3 /usr/local/lib/repvgg-deploy/sbom.cdx.json \
    && rm -rf /wheels /requirements \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/repvgg-deploy deploy \
    && install -d -m 1777 /work /var/lib/repvgg-deploy /var/lib/repvgg-deploy/cache /var/lib/repvgg-deploy/config
USER 10001:10001
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=60s --start-period=30s \
    CMD ["repvgg-deploy", "doctor", "--quiet", "--require", "gpu", "--require", "tensorrt"]
ENTRYPOINT ["gpu-entrypoint.sh"]
CMD ["--help"]
