# The image of kuberay.yaml. No virtual environment: KubeRay starts Ray in a login shell, which sets its own PATH.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*    # KubeRay's probes
RUN pip install --no-cache-dir torch==2.13.0 "ray[default,tune,train]==2.60.0"
WORKDIR /opt/sequence-flows
COPY . .
RUN pip install --no-cache-dir -e .
RUN useradd --uid 1000 --create-home ray
USER 1000
WORKDIR /home/ray
