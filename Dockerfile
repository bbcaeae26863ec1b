# Two targets.
#   docker build --target cpu -t repvgg-deploy:cpu .
#   docker build --target gpu --build-arg GPU_BASE=nvcr.io/nvidia/tensorrt:25.10-py3 -t repvgg-deploy:gpu .
# CI pipelines run it as one command, on files mounted at /work:
#   docker run --rm -v "$PWD:/work" repvgg-deploy:cpu export net.pth -o out

ARG GPU_BASE=nvcr.io/nvidia/tensorrt:25.10-py3
ARG CPU_BASE=python:3.12-slim

# The wheel is built once, so that neither image holds sources or build tools.
FROM ${CPU_BASE} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY repvgg_deploy repvgg_deploy
COPY models models
COPY calibration calibration
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM ${CPU_BASE} AS cpu
# Where PyTorch's CPU builds are to be had: without it pip takes the default build, gigabytes of CUDA libraries.
ARG TORCH_INDEX=""
ARG TORCH=2.13.0
COPY --from=wheel /wheels /wheels
COPY requirements/cpu.txt /wheels/
# All packages but torch are held to their hashes; torch has others in each index.
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch==${TORCH}" \
    && pip install --no-cache-dir --require-hashes -r /wheels/cpu.txt \
    && pip install --no-cache-dir --no-deps /wheels/*.whl \
    && rm -rf /wheels \
    && useradd --create-home deploy
USER deploy
WORKDIR /work
ENTRYPOINT ["repvgg-deploy"]
CMD ["--help"]

# The base brings CUDA and TensorRT 10 with its Python bindings (25.10: TensorRT 10.13, the oldest that is supported);
# torch brings its own CUDA. Engines and ONNX graphs need nothing of each other: ONNX Runtime runs on its CUDA provider.
FROM ${GPU_BASE} AS gpu
ARG TORCH=2.13.0
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
# The base has pins of its own for what it brings; here those of this project hold.
RUN sed -i 's/^onnxruntime==/onnxruntime-gpu==/' /wheels/constraints.txt \
    && export PIP_CONSTRAINT=/wheels/constraints.txt \
    && pip install --no-cache-dir "torch==${TORCH}" \
    && pip install --no-cache-dir "$(echo /wheels/*.whl)[gpu]" "cuda-python>=12.9" \
    && rm -rf /wheels \
    && useradd --create-home deploy
COPY docker/gpu-entrypoint.sh /usr/local/bin/
USER deploy
WORKDIR /work
ENTRYPOINT ["gpu-entrypoint.sh"]
CMD ["--help"]
