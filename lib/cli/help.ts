import { kernelVersions } from '../model_options.ts';
import type { Topic } from './options.ts';

const shared = `
  --backend NAME    auto (default): /dev/kvm when it opens, otherwise the
                    software kernel, and why · kvm: /dev/kvm or an error ·
                    software: without asking /dev/kvm
  --device PATH     another path than /dev/kvm
  --kernel VERSION  what the software kernel plays, instead of the newest:
                    ${kernelVersions.join(', ')}
  --arch NAME       what machine it plays: x86_64 (default), aarch64
  --json            one JSON document instead of text; bytes as numbers,
                    bit masks as hexadecimal strings
  -h, --help        this`;

const general = `guest-memfd: KVM private guest memory, on the real /dev/kvm or a software kernel

Usage: guest-memfd <command> [options]

Commands:
  probe    which backend is used here and why, and all it can do
  demo     memslots, host access, private memory, conversions, holes: live, with
           a map of the guest's memory after each step
  help     this; help <command> shows its options

Examples:
  guest-memfd probe                     what can this host do?
  guest-memfd demo                      the tour, on the best backend here
  guest-memfd demo --backend software   the tour without /dev/kvm
  guest-memfd help demo                 options of the tour

Exit status: 0 done · 1 it failed · 2 the command line cannot be.
DEBUG=1 adds the stack to an error. NO_COLOR=1 leaves the colours out.
`;

const topics: Readonly<Record<Topic, string>> = {
  probe: `guest-memfd probe: which backend is used here and why, and all it can do

Usage: guest-memfd probe [options]

Options:${shared}

Examples:
  guest-memfd probe
  guest-memfd probe --backend kvm     fails where KVM cannot be used
  guest-memfd probe --kernel 6.8      what did Linux 6.8 have?
  guest-memfd probe --arch aarch64 --kernel 6.18
  guest-memfd probe --json | jq .vmTypes.creatable
`,
  demo: `guest-memfd demo: the guest's memory, step by step

Usage: guest-memfd demo [options]

Options:
  --type NAME       VM type; the one with private memory where there is one
                    (guest-memfd probe lists them)
  --memory SIZE     guest memory, like 512M or 64G; 4G by default. It is
                    sparse: the tour holds some 160 MiB at most${shared}

Examples:
  guest-memfd demo
  guest-memfd demo --backend software --type sw-protected
                              the whole private story, without /dev/kvm
  guest-memfd demo --type default --memory 16G
  guest-memfd demo --json | jq '.parts[].steps[].held'
`,
};

export function help(topic: Topic | undefined): string {
  return topic === undefined ? general : topics[topic];
}
