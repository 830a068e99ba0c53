"""A local cloud whose pods run: images really built, pods as processes, kube-proxy, all in namespaces of their own."""
