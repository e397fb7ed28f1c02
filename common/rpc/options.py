"""Settings of gRPC's core that client and server must agree on.

A cut network is not noticed by default. Both ends ping every `KEEPALIVE_TIME_S` and give up after
`KEEPALIVE_TIMEOUT_S`; the server's limits on pings are raised with it, or it would answer `too_many_pings`. The timeout
leaves room for a machine whose cores are all busy.
"""

KEEPALIVE_TIME_S = 2.0
KEEPALIVE_TIMEOUT_S = 3.0
DEFAULT_MAX_MESSAGE_BYTES = 64 * 2**20

Options = list[tuple[str, int | str]]


def common_options(max_message_bytes: int) -> Options:
    """Options of both ends."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", round(KEEPALIVE_TIME_S * 1e3)),
        ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1e3)),
        # The kernel of a process that is stopped goes on acknowledging: without this its pings had a minute.
        ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1e3)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options(max_message_bytes: int, max_streams: int) -> Options:
    """`max_streams` bounds the calls that one connection may have open; further ones are refused, as UNAVAILABLE."""
    return [
        *common_options(max_message_bytes),
        # Two servers on one port would each get some of the connections: refuse to start instead.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", max_streams),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def channel_options(max_message_bytes: int) -> Options:
    """One TCP connection per channel, and quick reconnects: the fleet decides what a lost actor means."""
    return [
        *common_options(max_message_bytes),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # An actor that comes back at another address, under the name that it had, is found as soon as by `dns:///`.
        ("grpc.dns_min_time_between_resolutions_ms", 2000),
        # In truth how long a connection may take to come about: a handshake over a long way, on busy machines.
        ("grpc.min_reconnect_backoff_ms", 3000),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
