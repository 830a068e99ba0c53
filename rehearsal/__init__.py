"""The whole chain on one machine, on CPU, with a tiny Llama: arranges the containers' own entry points, no more."""
