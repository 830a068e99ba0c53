"""Runs the pods of a local cluster's nodes as real processes, in place of a kubelet: see `localcloud.runner.runner`."""
