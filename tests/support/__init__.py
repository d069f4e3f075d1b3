"""What tests share: models, shards, servers, configs and real ranks.  Imported as tests.support.X."""
