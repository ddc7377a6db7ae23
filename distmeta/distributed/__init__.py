"""Where task shards are computed: in this process, or on Ray actors, with the same bits."""
