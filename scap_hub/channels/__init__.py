"""Channel groups: what can leave a model together, found on its graph and proven by masking."""

from scap_hub.channels.discovery import channel_groups
from scap_hub.channels.groups import ChannelGroup, ChannelGroups
from scap_hub.channels.oracle import verify

__all__ = ["ChannelGroup", "ChannelGroups", "channel_groups", "verify"]
