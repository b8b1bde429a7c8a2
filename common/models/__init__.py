"""Model families that Triptych serves. Nothing here knows a message, a transport or a service."""
