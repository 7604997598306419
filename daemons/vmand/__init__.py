"""vmand: hard partitions. Owns cores, memory and the guest of each partition; `edgehold.api.vmand` is its contract."""
