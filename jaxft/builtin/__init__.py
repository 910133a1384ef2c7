"""Pictures that come with jaxft."""
