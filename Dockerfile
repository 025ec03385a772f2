# docker build -t flashrt . && docker run --rm -v ~/models:/models:ro -v flashrt:/cache -m 2g flashrt run ...
# docs/deploy.md says what the options are for.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-deps -w /wheels -c constraints.txt .

FROM python:3.12-slim
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /wheels/flashrt-*.whl)[serve]" \
    && useradd --create-home flashrt && mkdir /cache && chown flashrt /cache
USER flashrt
ENV XDG_CACHE_HOME=/cache
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["flashrt"]
CMD ["--help"]
