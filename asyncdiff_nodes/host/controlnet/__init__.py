"""ControlNets that ranks compute as a part of the network."""
