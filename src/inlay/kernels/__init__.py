"""Fast paths behind plain forms, each tested against its plain form bit for bit or in value and gradient."""
