// The Kubernetes provider of Pulumi, as its own main makes it: that one is in the module, but the two JSON files that
// it embeds are not generated there. The build takes them from beside it.
package main

import (
	_ "embed"

	"github.com/pulumi/pulumi-kubernetes/provider/v4/pkg/provider"
)

//go:embed schema.json
var schema []byte

//go:embed terraform-mapping.json
var mapping []byte

var version string // set by the linker

func main() { provider.Serve("kubernetes", version, schema, mapping) }
