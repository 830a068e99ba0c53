// Only the YAML files of these modules are taken: nothing is compiled, so `go mod tidy` would drop them.
// To upgrade: change a version here, then `go mod download MODULE@VERSION`, which writes its hashes into go.sum.
module drydock.test/crds

go 1.26.6

require (
	github.com/kedacore/keda/v2 v2.20.2
	github.com/prometheus-operator/prometheus-operator v0.92.0
	sigs.k8s.io/karpenter v1.13.0
)
