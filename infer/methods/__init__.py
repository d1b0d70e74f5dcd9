"""One small file a method: its flags, its fields of rows, how rows become a `jaxmix.Method`, and its pictures."""
