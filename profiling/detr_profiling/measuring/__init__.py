"""Time, memory and energy of one configuration in a process of its own, and the techniques that make it up."""
