# smlp-deploy on an NVIDIA GPU, with ONNX Runtime's CUDA provider and TensorRT. Not built or run where this project is
# tested, which has neither a container engine nor a GPU. The host needs a driver for CUDA 13 and NVIDIA's container
# toolkit; CUDA's own libraries come from Python packages, so the base has none.
#
#   docker build -f docker/nvidia.Dockerfile -t smlp-deploy:nvidia .
#   docker run --rm --gpus all --user "$(id -u)" -v "$PWD:/data" smlp-deploy:nvidia doctor
FROM python:3.12-slim AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[gpu]"
ENV XDG_CACHE_HOME=/data/.cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /data
ENTRYPOINT ["smlp"]
