"""The Kubernetes side of the stack: what runs in the cluster, and what it may reach."""
