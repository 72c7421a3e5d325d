"""AutoAttack (Croce and Hein, 2020) at speed: APGD, FAB and Square on slots that are always full."""
