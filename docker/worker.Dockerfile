# A worker with every engine but vLLM. For a CPU or for CUDA: TORCH_INDEX says whose builds of torch are installed,
# and nothing else differs. Layers go from what changes least to what changes most.
FROM python:3.11.15-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0 torchvision==0.28.0

WORKDIR /app
COPY pyproject.toml ./
ARG PREFECT
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
               print(*project['dependencies'], *project['optional-dependencies']['s3'], sep='\n')" > /tmp/wanted.txt \
 && pip install --no-cache-dir --requirement /tmp/wanted.txt "prefect==$PREFECT"

RUN useradd --create-home --uid 10001 app \
 && install --directory --owner app /prefect /store /models /adapters
COPY docker/with-secrets /usr/local/bin/
COPY README.md LICENSE ./
COPY mllmsrec_core mllmsrec_core
COPY storage storage
COPY tasks tasks
COPY flows flows
RUN pip install --no-cache-dir --no-deps --editable .

USER app
ENV PREFECT_HOME=/prefect HF_HOME=/models PYTHONUNBUFFERED=1
ENTRYPOINT ["sh", "/usr/local/bin/with-secrets"]
