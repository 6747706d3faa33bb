"""What the scripts share: options, the drawing loop, PNG settings, the contact sheet."""
