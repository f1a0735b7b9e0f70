"""Channel groups: what can leave a model together, found on its graph and proven by masking."""

from scap_hub.channels.groups import ChannelGroup, channel_groups
from scap_hub.channels.oracle import verify

__all__ = ["ChannelGroup", "channel_groups", "verify"]
