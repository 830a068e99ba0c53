"""A Kubernetes control plane and a stand-in for Azure on this machine."""
