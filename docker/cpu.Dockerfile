# smlp-deploy on a CPU. Not built where this project is tested, which has no container engine; what it installs and runs
# is tested there with a read-only root, another user and no network (scripts/container.py).
#
#   docker build -f docker/cpu.Dockerfile -t smlp-deploy:cpu .
#   docker run --rm --read-only --network none --user "$(id -u)" -v "$PWD:/data" smlp-deploy:cpu predict photos/
FROM python:3.12-slim AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[cpu]"
# Compiled networks and weights are kept in the working folder, the only one that has to be writable.
ENV XDG_CACHE_HOME=/data/.cache
USER 10001
WORKDIR /data
ENTRYPOINT ["smlp"]
