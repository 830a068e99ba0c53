"""A stand-in for Azure as the Pulumi engine meets it: the resource provider `azure-native`, and a registry's runs."""
